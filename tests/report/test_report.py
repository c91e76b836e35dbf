"""The report as data, on the terminal and as a model card, by structure rather than by letter."""

import io
import json
import re
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from rich.console import Console, RenderableType

from llmshrink.progress import seconds
from llmshrink.report.card import escape, fenced, front_matter, model_card
from llmshrink.report.rows import NOT_MEASURED, clean, comparison, grouped_events
from llmshrink.report.schema import (
    CalibrationReport,
    Check,
    EventRecord,
    GateReport,
    LayerReport,
    MemoryReport,
    ModelInfo,
    ModelMeasure,
    Report,
    RuntimeSupport,
    StageReport,
    TextScore,
)
from llmshrink.report.table import render, render_checks, render_plan

EVIL = "evil\x1b]0;pwned\x07\x1b[31m</details><script>alert(1)</script>[x](http://a.b)|\u202e\nrow"


def score(name: str, perplexity: float, kl: float | None = None) -> TextScore:
    return TextScore(
        dataset=name, fingerprint="f" * 64, rows=64, length=256, tokens=16320, perplexity=perplexity, kl=kl,
        top1=None if kl is None else 0.972, protocol="token perplexity, windows of 256 tokens, packed, BOS between",
    )  # fmt: skip


def layer(index: int, fallback: bool = False) -> LayerReport:
    return LayerReport(
        name=f"model.layers.{index}.mlp.up_proj", shape=(768, 256), method="gptq", form="Quantized",
        format="compressed-tensors", bits=4, group_size=128, parameters=196608, bytes_before=393216,
        bytes_after=101392, bits_per_weight=4.125, relative_error=0.08, seconds=0.2, fallback=fallback,
    )  # fmt: skip


def report(**changes: Any) -> Report:
    stage = StageReport(
        task="quantize", method={"name": "gptq", "bits": 4, "group_size": 128}, format="compressed-tensors",
        layers=[layer(0), layer(1, fallback=True)], bytes_before=16785920, bytes_after=7560000,
        planned_bytes_after=7560000, bits_per_weight=7.2, seconds={"calibrate": 3.0, "compress": 5.5, "write": 0.2},
        memory=MemoryReport(planned_bytes=100_000_000, measured_bytes=93_000_000),
        checks=[
            Check(name="tensors decoded", passed=True, detail="56 layers equal", value=0.0),
            Check(name="foreign reader", passed=True, detail="transformers, no missing key"),
        ],
        loads_in=[
            RuntimeSupport(runtime="transformers", support="dense-only", reason="decompresses", proof="foreign reader"),
            RuntimeSupport(runtime="vllm", support="native", reason="WNA16 kernels"),
            RuntimeSupport(runtime="llama.cpp", support="no", reason="it reads GGUF files only"),
        ],
    )  # fmt: skip
    before = ModelMeasure(
        label="original", tensor_bytes=16785920, bits_per_weight=16.0, loaded_bytes=16786048, load_seconds=0.3,
        prefill_tokens_per_second=1331.0, decode_tokens_per_second=44.5, peak_memory_bytes=61_000_000,
        sample="Once upon a time", scores=[score("stories", 14.35), score("maths", 23.14)],
    )  # fmt: skip
    after = before.model_copy(
        update={"label": "4 bit", "tensor_bytes": 7560000, "bits_per_weight": 7.2, "decode_tokens_per_second": None,
                "scores": [score("stories", 14.39, 0.00278), score("maths", 23.2, 0.00275)]}
    )  # fmt: skip
    fields: dict[str, Any] = {
        "llmshrink_version": "0.1.0", "created": datetime(2026, 11, 21, tzinfo=UTC), "recipe": {"version": 1},
        "recipe_hash": "abc", "device": "cpu", "seed": 0, "threads": 2, "stages": [stage], "before": before,
        "after": after, "output": "out/lab8m-w4", "seconds": 12.0,
        "model": ModelInfo(id="someone/lab8m", source="hub", commit="0123abc", licence="apache-2.0"),
        "calibration": CalibrationReport(data="auto", origin="the story generator", fingerprint="0" * 64,
                                         rows=128, length=256, tokens=32768),
        "events": [EventRecord(kind="rtn_fallback", message="no Cholesky factor", layer="a"),
                   EventRecord(kind="rtn_fallback", message="no Cholesky factor", layer="b")],
    }  # fmt: skip
    return Report(**{**fields, **changes})


def shown(renderable: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def one_line(text: str, label: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(label))


def test_report_survives_json_and_has_a_schema() -> None:
    original = report()
    assert Report.model_validate_json(original.model_dump_json()) == original
    schema = Report.model_json_schema()
    assert schema["properties"]["schema_version"]["const"] == 1
    assert schema["additionalProperties"] is False
    json.dumps(schema)


def test_report_refuses_unknown_keys_nan_and_other_versions() -> None:
    data = report().model_dump(mode="json")
    for wrong in ({"surprise": 1}, {"seconds": float("nan")}, {"schema_version": 2}):
        with pytest.raises(ValidationError):
            Report.model_validate(data | wrong)


def test_event_record_reads_an_event() -> None:
    event = SimpleNamespace(kind="k", message="m", layer=None, data={"x": 1.0})
    assert EventRecord.model_validate(event) == EventRecord(kind="k", message="m", data={"x": 1.0})


def test_table_shows_every_measure_within_80_columns() -> None:
    text = shown(render(report()))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"16\.8 MB +7\.6 MB +-55\.0 %", one_line(text, "tensors on disk"))
    assert re.search(r"16\.00 +7\.20", one_line(text, "bits per weight"))
    assert re.search(r"14\.350 +14\.390 +\+0\.3 %", one_line(text, "perplexity, stories"))
    assert re.search(r"- +0\.00278$", one_line(text, "  KL to the original").rstrip())
    assert re.search(r"44\.5 tok/s +not measured", one_line(text, "decode"))
    parts = ["gptq", "4.13 bits per weight", "1 layer by the method's fallback", "as planned", "2 checks passed"]
    parts += ["no Cholesky factor [a and 1 more]", "decompresses", "by rule", "out/lab8m-w4", "16,320 tokens"]
    assert not [part for part in parts if part not in " ".join(text.split())]


def test_nothing_measured_is_said_so_and_invents_no_number() -> None:
    rows = comparison(report(before=None, after=None, stages=[]))
    assert rows
    assert {cell for row in rows for cell in (row.before, row.after)} == {NOT_MEASURED}
    assert {row.change for row in rows} == {""}
    assert NOT_MEASURED in shown(render(report(before=None, after=None)))


def test_only_the_same_tokens_are_compared() -> None:
    other = score("stories", 99.0).model_copy(update={"fingerprint": "0" * 64})
    rows = comparison(report(before=ModelMeasure(label="original", scores=[other])))
    assert all(NOT_MEASURED in (row.before, row.after) for row in rows if row.label.startswith("perplexity"))


def test_size_that_differs_from_the_plan_is_not_hidden() -> None:
    stage = report().stages[0].model_copy(update={"planned_bytes_after": 1})
    assert "NOT as planned" in shown(render(report(stages=[stage])))


def test_failed_checks_are_listed() -> None:
    checks = [Check(name="reader", passed=False, detail="missing: lm_head.weight", value=1.5)]
    text = shown(render_checks(checks))
    assert "FAILED" in text and "1.5" in text and "missing: lm_head.weight" in text
    stage = report().stages[0].model_copy(update={"checks": checks})
    assert "1 of 1 check FAILED" in shown(render(report(stages=[stage])))


def evil_report() -> Report:
    stage = report().stages[0]
    stage = stage.model_copy(
        update={
            "checks": [Check(name=EVIL, passed=False, detail=EVIL)],
            "gates": [GateReport(name=EVIL, limit=1, value=None, passed=False, detail=EVIL)],
            "method": {"name": EVIL, "bits": EVIL},
            "format": EVIL,
            "loads_in": [RuntimeSupport(runtime=EVIL, support="no", reason=EVIL, proof=EVIL)],
        }
    )
    measure = ModelMeasure(label=EVIL, sample=EVIL, scores=[score(EVIL, 2.0).model_copy(update={"protocol": EVIL})])
    return report(
        stages=[stage], before=measure, after=measure, output=EVIL,
        model=ModelInfo(id=EVIL, source="hub", licence=EVIL, commit=EVIL),
        calibration=CalibrationReport(data=EVIL, origin=EVIL, fingerprint="0", rows=1, length=1, tokens=1),
        events=[EventRecord(kind=EVIL, message=EVIL, layer=EVIL)],
    )  # fmt: skip


def test_names_cannot_reach_the_terminal() -> None:
    text = shown(render(evil_report()), width=400)
    assert "evil" in text
    assert not set(text) & set("\x1b\x07\x9b\u202e\r")
    markup = evil_report().model_copy(update={"output": "[red]x[/red] [/]"})
    assert "[red]x[/red] [/]" in shown(render(markup), width=400)


def test_card_front_matter_and_sections() -> None:
    card = model_card(report(), "version: 1\n")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "someone/lab8m",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmshrink", "compressed-tensors", "gptq"],
    }
    assert re.findall(r"^## (.*)$", body, re.M) == [
        "Before and after", "What was done", "How to load it", "Verified", "Worth knowing", "Recipe"
    ]  # fmt: skip
    assert "| perplexity, stories | 14.350 | 14.390 | \\+0.3 % |" in body
    assert "```yaml\nversion: 1\n```" in body
    assert "pip install torch transformers compressed-tensors" in body


def test_card_has_snippets_only_for_runtimes_that_load_the_format() -> None:
    card = model_card(report(), "")
    assert "from_pretrained" in card and "vllm serve" in card and "llama.cpp: no" in card
    stage = report().stages[0]
    refused = [RuntimeSupport(runtime=name, support="no", reason="r") for name in ("transformers", "vllm")]
    card = model_card(report(stages=[stage.model_copy(update={"loads_in": refused})]), "")
    assert "from_pretrained" not in card and "vllm serve" not in card


@pytest.mark.parametrize(
    ("task", "auto", "words"),
    [
        ("feature-extraction", "AutoModel", "last_hidden_state"),
        ("fill-mask", "AutoModelForMaskedLM", "mask_token"),
        ("text-classification", "AutoModelForSequenceClassification", "id2label"),
        ("token-classification", "AutoModelForTokenClassification", "id2label"),
    ],
)
def test_an_encoder_is_told_in_its_own_words(task: str, auto: str, words: str) -> None:
    plain = report()
    assert plain.after is not None and plain.before is not None
    fields = {"perplexity": None} | (
        {"cosine": 0.9969, "relative_error": 0.079, "kl": None, "top1": None} if auto == "AutoModel" else {}
    )
    new = plain.after.scores[0].model_copy(update=fields)
    made = report(
        model=plain.model.model_copy(update={"task": task, "auto_class": auto}),
        before=plain.before.model_copy(update={"scores": []}),
        after=plain.after.model_copy(update={"scores": [new]}),
    )
    rows = {row.label: (row.before, row.after) for row in comparison(made)}
    if auto == "AutoModel":
        assert rows["cosine to the original's output, stories"] == ("-", "0.99690")
        assert rows["  relative error of the output"] == ("-", "7.9 %")
    else:
        unit = "row" if task == "text-classification" else "token"
        assert rows["same first choice, stories"] == ("-", "97.2 %")
        assert rows[f"  KL to the original, nats/{unit}"] == ("-", "0.00278")
    assert "forward pass" in rows and not any(label in ("prefill", "decode") for label in rows)
    assert not any("perplexity" in label for label in rows)
    card = model_card(made, "")
    assert f"model = {auto}.from_pretrained(folder)" in card and words in card and "generate(" not in card
    assert f"pipeline_tag: {task}" in card
    alone = report(model=made.model, before=made.before, after=None, stages=[])
    assert "only beside another model: --baseline" in one_line(shown(render(alone)), "likeness to the original")


def test_card_of_a_local_folder_names_no_path_and_no_base_model() -> None:
    local = report(model=ModelInfo(id="/home/somebody/models/mine", source="folder"))
    card = model_card(local, "")
    assert "somebody" not in card and "# mine, made smaller" in card
    assert "base_model" not in front_matter(local) and "license" not in front_matter(local)
    assert "licence of the original is not known" in card


def test_names_cannot_become_markup_in_the_card() -> None:
    card = model_card(evil_report(), f"model: {EVIL}\n```\n<script>\n")
    assert not set(card) & set("\x1b\x07\x9b\u202e\r")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == clean(EVIL)
    text, fence, recipe = body.partition("````yaml\n")
    assert fence and recipe.endswith("\n````\n") and "````" not in recipe.removesuffix("````\n")
    assert "<script" not in text and "</details" not in text and "](" not in text and "http:" + "//" not in text
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert cells == {5}


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("a\x1b[31mb\x07", "a[31mb"),
        ("two\nlines\r\n", "two lines"),
        ("\u202eabc\u200b", "abc"),
        ("Zürich 東京 🙂", "Zürich 東京 🙂"),
    ],
)
def test_clean(raw: str, safe: str) -> None:
    assert clean(raw) == safe


def test_escape_and_fence() -> None:
    assert escape("<b>*x*</b>") == "&lt;b&gt;\\*x\\*&lt;/b&gt;"
    assert fenced("a\n````\n", "yaml") == "`````yaml\na\n````\n`````"


def test_words() -> None:
    assert [seconds(s) for s in (0.5, 12.3, 75, 7260)] == ["0.50 s", "12.3 s", "1 min 15 s", "2 h 01 min"]
    events = [EventRecord(kind="damping", message="x10")] * 3
    assert grouped_events(events) == ["damping: x10 (3 times)"]


def test_grown_numbers_stay_within_80_columns() -> None:
    huge = ModelMeasure(
        label="x", tensor_bytes=10**13, bits_per_weight=32.0, loaded_bytes=10**13, load_seconds=5000,
        prefill_tokens_per_second=123456, scores=[score("a-very-long-data-set/name-of-a-text", 1e300, 10.5)],
    )  # fmt: skip
    text = shown(render(report(before=huge, after=huge)))
    assert max(map(len, text.splitlines())) <= 80
    assert "1.00e+300" in text


def plan(blocks: int = 3) -> Any:
    def one(name: str, method: str | None, reason: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, shape=(768, 256), parameters=196608, method=method, bits=4 if method else None,
            group_size=128, type=None, bytes_before=393216, bytes_after=101392 if method else 393216, reason=reason,
            shape_before=None, open=False,
        )  # fmt: skip

    def outside(name: str, size: int) -> SimpleNamespace:
        return SimpleNamespace(name=name, bytes_before=size, bytes_after=size, parameters=size // 2)

    found = [
        SimpleNamespace(index=i, layers=[
            one(f"model.layers.{i}.self_attn.q_proj", "gptq"),
            *(one(f"model.layers.{i}.mlp.experts.{e}.up_proj", "gptq") for e in range(8)),
            one(f"model.layers.{i}.mlp.down_proj", None, "the recipe leaves it out"),
        ])
        for i in range(blocks)
    ]  # fmt: skip
    return SimpleNamespace(
        model="someone/moe\x1b[31m", method="gptq", format="compressed-tensors", type=None,
        transforms=None, allocation=None, cut=None, training=None,
        adapter=None, ratios=None, learning_steps=0, tuning_steps=0,
        blocks=found, layers=[layer for block in found for layer in block.layers],
        others=[
            outside("model.embed_tokens.weight", 2_000_000),
            *(outside(f"model.layers.{i}.norm_{n}.weight", 512) for i in range(blocks) for n in "abc"),
        ],
        bytes_are_bound=False,
        parameters=10_000_000, parameters_compressed=9_000_000, bytes_before=20_000_000, bytes_after=6_000_000,
        bits_per_weight=4.8, memory_bytes=50_000_000, evaluation_bytes=0, disk_bytes=7_000_000, disk_free=10**9,
        file_bytes={"a.safetensors": 5_000_000, "b.safetensors": 2_000_000}, max_bytes=None,
        loads_in=[SimpleNamespace(runtime="vllm", support="no", reason="fused [red]", source="its rules")],
        events=[SimpleNamespace(kind="group_size", message="groups of 64", layer=None, data=None)],
    )  # fmt: skip


def test_a_plan_says_whether_the_files_fit() -> None:
    assert "max_size" not in shown(render_plan(plan()))
    for limit, words in ((7_000_000, "max_size allows 7,000,000: it fits"), (6_999_999, "6,999,999: TOO LARGE")):
        made = plan()
        made.max_bytes = limit
        assert words in shown(render_plan(made))


def test_gates_are_shown_on_the_terminal_and_in_the_card() -> None:
    gates = [
        GateReport(name="max_ppl_increase", limit=0.03, value=0.0523, passed=False, detail="stories"),
        GateReport(name="max_kl", limit=0.02, value=0.00278, passed=True, detail="stories"),
        GateReport(name="min_top1", limit=0.97, value=None, passed=False, detail="not measured"),
        GateReport(name="max_size", limit=3758096384, value=3758096385, passed=False),
    ]
    assert Report.model_validate_json(gated(gates).model_dump_json()) == gated(gates)
    text = shown(render(gated(gates)))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"FAILED +max_ppl_increase +at most 3\.00 % +5\.23 % +stories", text)
    assert re.search(r"ok +max_kl +at most 0\.02000 +0\.00278 +stories", text)
    assert re.search(r"FAILED +min_top1 +at least 97\.00 % +not measured", text)
    assert re.search(r"FAILED +max_size +at most 3\.758 GB +3\.758 GB", text)
    card = model_card(gated(gates), "")
    assert (
        "## Gates\n\n- **FAILED**: max\\_ppl\\_increase: 5.23 %, asked at most 3.00 % \\(stories\\)\n- passed" in card
    )
    assert "Gates" not in shown(render(report())) and "## Gates" not in model_card(report(), "")


def gated(gates: list[GateReport]) -> Report:
    return report(stages=[report().stages[0].model_copy(update={"gates": gates})])


def test_plan_is_grouped_by_kind_of_layer() -> None:
    text = shown(render_plan(plan(blocks=40)))
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) < 25
    assert re.search(r"mlp\.experts\.\*\.up_proj +320 +768x256 +gptq W4 g128", text)
    assert re.search(r"mlp\.down_proj +40 +768x256 +left as it is", text)
    parts = ["the recipe leaves it out", "90.0 %", "4.80 bits", "1.0 GB free", "group_size: groups of 64"]
    assert not [part for part in [*parts, "embed_tokens", "other tensors"] if part not in text]
    assert "\x1b" not in text
