"""Adapters from end to end: a few numbers learn a text, and plain peft loads what they learned."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, content, load, logits
from helpers import recipe as quantizing
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import build_model, config
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from llmshrink import run
from llmshrink.bottleneck import BottleneckModel, is_bottleneck
from llmshrink.calibration.labelled import read_labelled
from llmshrink.cli import main
from llmshrink.errors import GateError, InputError, InterruptedRun, PlanError, RecipeError
from llmshrink.evaluate.reader import read
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.adapting import Adapting
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import EvalStage
from llmshrink.report.rows import stage_lines
from llmshrink.report.schema import Check, Report, StageReport
from llmshrink.train.adaptation import Adaptation
from llmshrink.train.data import Examples
from llmshrink.train.learner import Learner

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
METHODS: dict[str, dict[str, Any]] = {  # small settings, and a rate for models of nothing
    "lora": {"rank": 4},
    "rslora": {"rank": 8},
    "dora": {"rank": 4},
    "adalora": {"rank": 2},
    "vera": {"rank": 16},
    "ia3": {},
    "prefix": {"tokens": 4},
    "prompt": {"tokens": 4},
    "p-tuning": {"tokens": 4, "width": 16},
    "adapter": {"width": 8, "placement": "houlsby"},
}
SLOW = pytest.mark.slow
OFTEN = ("lora", "rslora", "dora", "prompt", "vera", "ia3")  # others of their kind are tried in the default suite
RATES = {"prefix": 3e-2, "prompt": 3e-2, "ia3": 3e-2, "vera": 3e-2}


@pytest.fixture(scope="module", autouse=True)
def _without_readers() -> Iterator[None]:
    """Read adapters in this process: starting another one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
        patch.setattr("llmshrink.checks.adapter.measure", lambda requests: [read(request) for request in requests])
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function family -> folder of a model of two narrow layers."""
    root = tmp_path_factory.mktemp("narrow")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            more = {} if family == "gpt2" else SMALL
            build_model(root / family, config(family, **more))
        return root / family

    return folder


def wanted(
    model: Path, out: Path, text: Path, method: dict[str, Any] | str = "lora", stage: Any = (), **train: Any
) -> Recipe:
    steps = {"data": str(text), "length": 16, "batch": 2, "max_steps": 6, "rate": 1e-2, **train}
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{"task": "lora", "method": method, "train": steps, **dict(stage)}],
            "evaluation": {"data": [], "speed": False},
            "output": str(out),
        }
    )


def done(recipe: Recipe) -> StageReport:
    (stage,) = run.execute(recipe, progress=Silent()).stages
    assert stage.trained is not None
    return stage


def as_peft_reads(model: Path, adapter: Path) -> PeftModel:
    kind, base = BottleneckModel if is_bottleneck(adapter) else PeftModel, load(model)[0]
    logits(base)  # compressed-tensors decodes while a model is run for the first time
    return kind.from_pretrained(base, str(adapter)).eval()


def given_out(model: PeftModel) -> Tensor:
    ids = torch.randint(0, 160, (3, 32), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits[:, -32:].float()
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW if n in OFTEN else ()) for n in METHODS])
def test_each_kind_learns_and_is_read_by_peft(
    name: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    recipe = wanted(
        model, out, text_file, {"name": name, **METHODS[name]}, max_steps=20, rate=RATES.get(name, 1e-2), evaluations=1
    )
    plan = run.make_plan(recipe)
    stage = done(recipe)
    trained, adapter = stage.trained, stage.adapter
    assert trained is not None and adapter is not None and plan.adapter is not None
    assert trained.held_after < trained.held_before  # type: ignore[operator]
    assert adapter.learns == plan.adapter.learns == trained.parameters
    saved = load_file(out / "adapter_model.safetensors")
    assert adapter.bytes == sum(tensor.nbytes for tensor in saved.values()) <= plan.adapter.bytes
    assert (adapter.bytes == plan.adapter.bytes) or plan.adapter.at_most
    assert any(" of tensors, as planned" in line for line in stage_lines(stage))
    assert {check.name: check.passed for check in stage.checks} == {"hashes": True, "decode": True, "reader": True}
    assert not (given_out(as_peft_reads(model, out)) - logits(load(model)[0])).abs().max() < 1e-3
    assert not (out / ".work").exists() and str(model) not in (out / "adapter_config.json").read_text()


@pytest.mark.parametrize("name", [pytest.param("lora", marks=SLOW), "adalora", pytest.param("p-tuning", marks=SLOW)])
def test_a_stopped_run_gives_the_same_bytes(
    name: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    whole, out, method = tmp_path / "whole", tmp_path / "out", {"name": name, **METHODS[name]}
    if "rank" in method:
        method["dropout"] = 0.1
    first = done(wanted(tiny("llama"), whole, text_file, method, max_steps=9))
    for note in ("step 3 of 9", "step 7 of 9"):
        with pytest.raises(InterruptedRun):
            run.execute(
                wanted(tiny("llama"), out, text_file, method, max_steps=9), progress=Stopping(step="lora", note=note)
            )
    again = done(wanted(tiny("llama"), out, text_file, method, max_steps=9))
    assert content(out) == content(whole)
    assert first.trained is not None and again.trained is not None and first.trained.curve == again.trained.curve


def test_all_linears_of_any_family_are_found(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    plan = run.make_plan(wanted(tiny("gpt2"), tmp_path / "out", text_file))
    assert plan.adapter is not None and plan.adapter.targets == ["c_attn", "c_proj", "c_fc"]
    assert all(layer.method == "lora" for layer in plan.layers)
    done(wanted(tiny("gpt2"), tmp_path / "out", text_file))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "lora"),
        *(pytest.param("llama", name, marks=SLOW) for name in ("lora", "dora", "adalora", "vera", "ia3")),
        pytest.param("gpt2", "ia3", marks=SLOW),
    ],
)
def test_merged_is_the_same_function(
    family: str, name: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model, method = tiny(family), {"name": name, **METHODS[name]}
    beside = wanted(model, tmp_path / "beside", text_file, method, max_steps=9, rate=3e-2)
    done(beside)
    within = wanted(model, tmp_path / "within", text_file, method, {"merge": True}, max_steps=9, rate=3e-2)
    stage = done(within)
    assert stage.checks[0].name == "merged" and all(check.passed for check in stage.checks)
    assert stage.task == "lora" and stage.adapter is not None and stage.bytes_after == stage.bytes_before
    found, right = logits(load(tmp_path / "within")[0]), given_out(as_peft_reads(model, tmp_path / "beside"))
    assert (found - right).abs().max() < 1e-4
    assert (found - logits(load(model)[0])).abs().max() > 1e-3


@pytest.mark.parametrize("name", [pytest.param("full", marks=SLOW), "freeze"])
def test_a_model_learns_itself(name: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    method = {"full": "full", "freeze": {"name": "freeze", "blocks": 1, "parts": ["norms", "head"]}}[name]
    recipe = wanted(tiny("llama"), tmp_path / "out", text_file, method, max_steps=20)
    stage, before = done(recipe), load_file(tiny("llama") / "model.safetensors")
    after = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert stage.adapter is not None and stage.trained is not None
    assert stage.trained.held_after < stage.trained.held_before  # type: ignore[operator]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    head = {"lm_head.weight"} & before.keys()
    norms = {key for key in before if "norm" in key}
    assert moved == (before.keys() if name == "full" else head | norms | {k for k in before if ".layers.1." in k})
    assert stage.adapter.learns == sum(before[key].numel() for key in moved) == run.make_plan(recipe).adapter.learns  # type: ignore[union-attr]


def test_what_stands_before_begins_as_words(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """Untrained, a prefix is what the model makes of the same words; a prompt too, from where they stand."""
    model, words = tiny("llama"), "The old fox went"
    source = open_source(str(model))
    ids = torch.tensor([source.tokenizer(words)["input_ids"]])
    rows = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        right = load(model)[0](torch.cat([ids, rows], dim=1)).logits[:, -12:]
    for name in ("prefix", "prompt"):
        method = {"name": name, "tokens": ids.shape[1], "text": words}
        recipe = wanted(model, tmp_path / name, text_file, method)
        adapting = Adapting(recipe, recipe.stages[0], StreamedModel(source, torch.device("cpu")))  # type: ignore[arg-type]
        lesson = Adaptation(adapting, torch.device("cpu"), steps=1, probe=rows)
        with torch.no_grad():
            found = lesson.model(input_ids=rows, use_cache=False).logits[:, -12:]
        assert torch.allclose(found, right, atol=1e-5), name


def test_names_that_are_not_there_are_told_with_those_that_are(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(PlanError, match=r"no linear of a block is called 'query'; there are: q_proj, k_proj, v_proj"):
        run.make_plan(wanted(tiny("llama"), out, text_file, stage={"target": ["query"]}))
    plan = run.make_plan(wanted(tiny("llama"), out, text_file, stage={"target": ["v_proj", r"model.layers.1.mlp\..*"]}))
    found = {layer.name.removeprefix("model.layers.") for layer in plan.layers if layer.method}
    last = {f"1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert found == {"0.self_attn.v_proj", "1.self_attn.v_proj", *last}
    with pytest.raises(PlanError, match="has no tokens"):
        run.make_plan(wanted(tiny("llama"), out, text_file, {"name": "prompt", "text": "\u200b"}))


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"method": {"name": "ia3", "rank": 4}}, "stages[0].method.rank: not of ia3, which takes no settings"),
        ({"method": "prompt", "merge": True}, "stages[0].merge: no weights say what prompt does"),
        ({"method": "prompt", "target": "q_proj"}, "stages[0].target: prompt chooses no linears"),
        ({"target": "q_proj("}, "neither a name nor a regular expression"),
        ({"target": ["auto", "q_proj"]}, "auto means all linears"),
        ({"method": {"name": "freeze", "blocks": 0, "parts": []}}, "nothing learns"),
    ],
)
def test_what_makes_no_sense_is_refused(stage: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        validate({"version": 1, "stages": [{"task": "lora", **stage}]})
    assert told in str(refusal.value)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linears bitsandbytes reads right: whole blocks of 64 in each row."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    build_model(folder, config("llama"))
    return folder


@pytest.mark.parametrize("name", ["qlora", pytest.param("loftq", marks=SLOW)])
def test_a_model_in_four_bits_learns(
    name: str, wide: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = wanted(wide, tmp_path / name, text_file, {"name": name, "rank": 8}, max_steps=20)
    data = {"data": [str(text_file)], "rows": 2, "length": 16, "speed": False}
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_validate(data)})
    report = run.execute(recipe, progress=Silent())
    (stage,) = report.stages
    assert stage.trained is not None and stage.trained.held_after < stage.trained.held_before  # type: ignore[operator]
    assert all(check.passed for check in stage.checks) and stage.adapter is not None and stage.adapter.four_bits
    assert report.before is not None and report.after is not None
    assert report.after.scores[0].perplexity < report.before.scores[0].perplexity  # type: ignore[operator]
    assert (tmp_path / name / "base" / "config.json").exists() == (name == "loftq")
    if name == "loftq":  # it is for no base but its own
        weights = (tmp_path / name).rglob("*.safetensors")
        size = sum(tensor.nbytes for path in weights for tensor in load_file(path).values())
        assert stage.bytes_after == report.after.tensor_bytes == run.make_plan(recipe).bytes_after == size
        assert size < stage.bytes_before
        measure = ["--evaluation", str(text_file), "--rows", "2", "--length", "16", "--json", "--quiet"]
        assert main(["adapters", "compare", str(wide), str(tmp_path / name), *measure]) == 8
        assert f"is for a model of its own, and not for {wide}" in capsys.readouterr().err
        assert main(["adapters", "compare", str(tmp_path / name / "base"), str(tmp_path / name), *measure]) == 0
        (line,) = json.loads(capsys.readouterr().out)
        assert line[str(tmp_path / name)] == pytest.approx(report.after.scores[0].perplexity, rel=1e-4)
        assert main(["adapters", "ls", str(tmp_path / name), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["own"] == str(tmp_path / name / "base")
    alone = recipe.model_copy(update={"stages": [EvalStage(task="eval")], "output": None})
    plain = run.execute(alone, progress=Silent())
    assert plain.before is not None  # the original itself was measured, not its four bits
    assert plain.before.scores[0].perplexity == pytest.approx(report.before.scores[0].perplexity, rel=1e-5)
    merged = wanted(wide, tmp_path / "merged", text_file, {"name": name, "rank": 8}, {"merge": True}, max_steps=20)
    found = run.execute(merged, progress=Silent())
    assert found.stages[0].checks[0].name == "merged" and all(check.passed for check in found.stages[0].checks)
    assert "masked" not in {event.kind for event in found.events}  # NF4 has a code for zero: nobody pruned those


def test_a_quantized_model_learns_and_is_quantized_again(wide: Path, text_file: Path, tmp_path: Path) -> None:
    nf4 = tmp_path / "nf4"
    run.execute(quantizing(wide, nf4, text_file, {"name": "nf4", "double_quant": True}), progress=Silent())
    done(wanted(nf4, tmp_path / "beside", text_file, {"name": "lora", "rank": 8}, max_steps=20))
    stage = done(wanted(nf4, tmp_path / "out", text_file, {"name": "lora", "rank": 8}, {"merge": True}, max_steps=20))
    assert stage.checks[0].name == "merged" and all(check.passed for check in stage.checks)
    assert {layer.method for layer in stage.layers} == {"nf4"} and stage.bytes_after == stage.bytes_before
    right = given_out(as_peft_reads(nf4, tmp_path / "beside"))
    far, near = ((logits(load(folder)[0]) - right).norm() for folder in (nf4, tmp_path / "out"))
    assert near < 0.7 * far
    for method, why in (("full", "codes do not learn"), ("qlora", "is quantized already")):
        with pytest.raises(PlanError, match=why):
            run.make_plan(wanted(nf4, tmp_path / "other", text_file, method))
    with pytest.raises(PlanError, match="bitsandbytes misreads rows of 32"):
        run.make_plan(wanted(smaller(tmp_path), tmp_path / "other", text_file, "qlora"))


def test_a_model_on_a_grid_learns_and_is_quantized_again(wide: Path, text_file: Path, tmp_path: Path) -> None:
    codes, grid = tmp_path / "codes", {"name": "gptq", "bits": 4, "group_size": 16}
    some = {"layers": {".*down_proj": {"bits": 8}}, "ignore": [".*1.*o_proj"]}
    run.execute(quantizing(wide, codes, text_file, grid, stage=some), progress=Silent())
    stage = done(wanted(codes, tmp_path / "beside", text_file, {"name": "lora", "rank": 8}, max_steps=20))
    assert all(check.passed for check in stage.checks)
    merging = wanted(codes, tmp_path / "out", text_file, {"name": "lora", "rank": 8}, {"merge": True}, max_steps=20)
    calibration = merging.calibration.model_copy(update={"data": str(text_file), "samples": 8, "length": 32})
    stage = done(merging.model_copy(update={"calibration": calibration}))
    assert stage.checks[0].name == "merged" and all(check.passed for check in stage.checks)
    assert {layer.method for layer in stage.layers} == {"gptq", None} and stage.bytes_after == stage.bytes_before
    assert [layer.bits for layer in stage.layers if layer.name.endswith("down_proj")] == [8, 8]
    right = given_out(as_peft_reads(codes, tmp_path / "beside"))
    far, near = ((logits(load(folder)[0]) - right).norm() for folder in (codes, tmp_path / "out"))
    assert near < 0.7 * far
    tables = tmp_path / "tables"
    run.execute(quantizing(wide, tables, text_file, {"name": "kmeans", "bits": 4}), progress=Silent())
    with pytest.raises(PlanError, match="stored as codebook in a way that no adapter can be merged into"):
        run.make_plan(wanted(tables, tmp_path / "other", text_file, stage={"merge": True}))


def smaller(tmp_path: Path) -> Path:
    build_model(tmp_path / "smaller", config("llama", **SMALL))
    return tmp_path / "smaller"


def test_what_was_pruned_stays_pruned(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    half = {"name": "magnitude", "sparsity": 0.5}
    run.execute(
        quantizing(tiny("llama"), pruned, text_file, half, stage={"format": {"name": "dense"}}), progress=Silent()
    )
    merging = wanted(pruned, out, text_file, {"name": "lora", "rank": 4}, {"merge": True})
    report = run.execute(merging, progress=Silent())
    before, after = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()} for folder in (pruned, out)
    )
    zeros = {key: weight == 0 for key, weight in before.items() if (weight == 0).any()}
    assert len(zeros) == 14 and not any(after[key][mask].any() for key, mask in zeros.items())
    assert all(not torch.equal(before[key], after[key]) for key in zeros)
    (masked,) = [event for event in report.events if event.kind == "masked"]
    assert f"{sum(int(mask.sum()) for mask in zeros.values()):,} weights that were pruned stay zero" in masked.message
    for keep, name in (("auto", "stay"), (False, "go")):
        last = {"name": "freeze", "blocks": 1, "parts": []}
        learning = wanted(pruned, tmp_path / name, text_file, last, (), keep_zeros=keep)
        trained = run.execute(learning, progress=Silent()).stages[0].trained
        found = {k: v for f in (tmp_path / name).glob("*.safetensors") for k, v in load_file(f).items()}
        gone = [key for key, mask in zeros.items() if found[key][mask].any()]
        assert trained is not None and len(trained.zeros) == (14 if keep else 0) and len(gone) == (0 if keep else 7)


def test_bottlenecks_stand_where_they_should(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """x + up(gelu(down(x))) behind the MLP, written out; where peft knows nothing of it, it says so."""
    out = tmp_path / "out"
    done(wanted(tiny("llama"), out, text_file, {"name": "adapter", "width": 8}, max_steps=20))
    found, state = given_out(as_peft_reads(tiny("llama"), out)), load_file(out / "adapter_model.safetensors")
    plain = load(tiny("llama"))[0]

    def behind(index: int) -> Callable[..., Tensor]:
        def follow(_: object, __: object, x: Tensor) -> Tensor:
            own = {key: state[f"model.layers.{index}.mlp.down_proj.{key}"] for key in KEYS}
            inner = torch.nn.functional.gelu(x @ own["down.weight"].T + own["down.bias"])
            return x + inner @ own["up.weight"].T + own["up.bias"]

        return follow

    for index, layer in enumerate(plain.model.layers):
        layer.mlp.register_forward_hook(behind(index))
    assert torch.allclose(logits(plain), found, atol=1e-5)
    with pytest.raises(Exception, match="peft_type|adapter_type|places|NoneType"):
        PeftModel.from_pretrained(load(tiny("llama"))[0], str(out))
    with pytest.raises(InputError, match="is for another model: GPT2LMHeadModel has no model.layers.0.mlp.down_proj"):
        BottleneckModel.from_pretrained(load(tiny("gpt2"))[0], out)


KEYS = ("down.weight", "down.bias", "up.weight", "up.bias")


def test_what_was_learned_is_judged(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A perplexity that falls is what was asked for; the card's own words load the adapter."""
    out = tmp_path / "out"
    given = ["lora", str(tiny("llama")), "--rank", "4", "--rate", "0.01", "--data", str(text_file), "--max-steps", "20"]
    small = ["--set", "train.length=16", "--set", "evaluation.length=16", "--set", "evaluation.rows=2", "-o", str(out)]
    judged = [
        "--evaluation",
        str(text_file),
        "--max-ppl-increase",
        "1%",
        "--max-size",
        "200%",
        "--target",
        "q_proj,v_proj",
    ]
    assert main([*given, *small, *judged]) == 0
    said = capsys.readouterr().out
    assert "numbers learn" in said and "q_proj, v_proj" in said and "max_ppl_increase" in said
    report = Report.model_validate_json((out / "report.json").read_bytes())
    assert {gate.name: gate.passed for gate in report.stages[0].gates} == {"max_ppl_increase": True, "max_size": True}
    assert main(["verify", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "BitsAndBytes" not in card
    code = card.partition("```python")[2].partition("```")[0]
    code = code.replace('"model"', repr(str(tiny("llama")))).replace(
        f'"{tiny("llama").name}"', repr(str(tiny("llama")))
    )
    exec(code.replace('"path/to/this/folder"', repr(str(out))), {})
    assert main([*given, *small, *judged, "--overwrite", "--max-kl", "0"]) == 9


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=SLOW) for name in ("bert-masked", "bert-classes"))]
)
def test_classes_are_told_apart(
    family: str, models_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Foxes and herons, by words in the text; a model of classes keeps its head and their names."""
    model, out, data = models_folder(family), tmp_path / "out", tmp_path / "rows.jsonl"
    names = ("LABEL_0", "LABEL_3") if family == "bert-classes" else ("fox", "heron")
    kinds = [(f"The old {('fox', 'heron')[n % 2]} saw {n} lamps by the river.", names[n % 2]) for n in range(60)]
    data.write_text("\n".join(json.dumps({"text": text, "kind": kind}) for text, kind in kinds))
    recipe = wanted(
        model, out, data, {"name": "lora", "rank": 4}, {"label": "kind"}, max_steps=40, hold="20%", batch=6, rate=3e-3
    )
    plan, stage = run.make_plan(recipe), done(recipe)
    assert plan.adapter is not None and stage.adapter is not None and stage.trained is not None
    assert stage.adapter.learns == plan.adapter.learns and all(check.passed for check in stage.checks)
    assert stage.adapter.accuracy is not None and stage.adapter.most is not None
    first, *_, last = [point.value for point in stage.trained.curve if point.kind == "loss"]
    assert last < first
    for command in (["compare"], ["merge", "--into", "-o", str(tmp_path / "merged")]):
        assert main(["adapters", command[0], str(model), str(out), *command[1:]]) == 8
        assert "does not predict the next token: its task is SEQ_CLS" in capsys.readouterr().err
    if family != "llama":  # which alone learns it in so few steps
        return
    assert stage.adapter.accuracy > max(0.9, stage.adapter.most)
    count = len(stage.adapter.classes)
    assert stage.adapter.classes == ["fox", "heron"]
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=count, dtype=torch.float32)
    found, tokenizer = PeftModel.from_pretrained(base, str(out)).eval(), AutoTokenizer.from_pretrained(out)
    for kind in (0, 1):
        tokens = tokenizer(kinds[kind][0], return_tensors="pt")
        assert stage.adapter.classes[int(found(tokens["input_ids"]).logits.argmax())] == names[kind]
    settings = json.loads((out / "adapter_config.json").read_bytes())["modules_to_save"]
    assert len(settings) == len(set(settings)) and "score" in settings
    assert json.loads((out / "classes.json").read_bytes()) == ["fox", "heron"]
    assert any("loss on 12 rows held back" in line for line in stage_lines(stage))
    assert "value (nats per row)" in (out / "loss.csv").read_text()
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "BitsAndBytes" not in card
    code = card.partition("```python")[2].partition("```")[0]
    code = code.replace('"path/to/this/folder"', repr(str(out))).replace(f'"{model.name}"', repr(str(model)))
    capsys.readouterr()
    exec(code.replace("Once upon a time", kinds[1][0]), {})
    assert capsys.readouterr().out == "heron\n"


def test_rows_of_csv(models_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The same rows as of JSON: quotes, commas, line breaks, a byte order mark; faults by their lines."""
    rows = [
        {"text": 'a "fox", red', "kind": "0"},
        {"text": "two\nlines", "kind": "1"},
        {"text": "a heron", "kind": "0"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with (tmp_path / "rows.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["kind", "text"])
        writer.writeheader()
        writer.writerows(rows)
    read_rows = partial(
        read_labelled,
        tokenizer=open_source(str(models_folder("llama"))).tokenizer,
        label="kind",
        text=None,
        length=16,
        split=None,
        seed=0,
    )
    one, other = (read_rows(str(tmp_path / f"rows.{ending}")) for ending in ("json", "csv"))
    assert one.fingerprint == other.fingerprint and one.labels == other.labels
    for text, told in (
        ("text,kind\na,x\nb, c,y\n", "line 3 has more values than the first line has names"),
        ("text,kind\na,x\nb\n", "line 3: column 'kind' holds no class"),
        ('text,kind\na,x\n"b,y\n', "cannot be read as csv"),
        ("text,sort\na,x\n", "line 2 has no column 'kind'; it has: text, sort"),
    ):
        (tmp_path / "rows.csv").write_text(text)
        with pytest.raises(InputError, match=told):
            read_rows(str(tmp_path / "rows.csv"))


def test_rows_without_a_class_are_named(models_folder: Callable[[str], Path], tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    good = '{"text": "a fox", "kind": "a"}\n'
    for family, text, told in (
        ("llama", good + "\n" + '{"text": "a heron"}', "line 3 has no column 'kind'; it has: text"),
        ("llama", good + '{"text": " ", "kind": "b"}', "line 2: column 'text' holds no text"),
        ("llama", good + '{"text": "a", "kind": null}', "line 2: column 'kind' holds no class, but None"),
        ("llama", good, "holds one class"),
        ("bert-classes", good, "the model has no class 'a'; it has LABEL_0, LABEL_1"),
    ):
        data.write_text(text)
        with pytest.raises(InputError, match=told):
            run.make_plan(wanted(models_folder(family), out, data, stage={"label": "kind"}))
    with pytest.raises(PlanError, match="only models that predict the next token learn from text"):
        run.make_plan(wanted(models_folder("bert-masked"), out, data))
    with pytest.raises(RecipeError, match="an adapter beside linears and a head of its own, not by prompt"):
        wanted(models_folder("llama"), out, data, "prompt", {"label": "kind"})


@pytest.mark.parametrize("stage", [{"merge": True}, pytest.param({"method": "freeze"}, marks=SLOW)])
def test_a_stopped_run_writes_the_same_model(
    stage: dict[str, Any], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    done(wanted(tiny("llama"), whole, text_file, stage=stage))
    for step, note in (("lora", "step 3 of 6"), ("compress", "")):
        with pytest.raises(InterruptedRun):
            run.execute(wanted(tiny("llama"), out, text_file, stage=stage), progress=Stopping(step=step, note=note))
    done(wanted(tiny("llama"), out, text_file, stage=stage))
    assert content(out) == content(whole)


@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_an_anchor_is_what_was_said_before(name: str, tiny: Callable[[str], Path]) -> None:
    base = load(tiny("llama"))[0]
    kinds: dict[str, PeftConfig] = {
        "lora": LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"]),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    model = get_peft_model(base, kinds[name]).train()
    ids = torch.randint(0, 160, (2, 9), generator=torch.Generator().manual_seed(3))
    labels = torch.where(torch.arange(9) > 3, ids, -100).repeat(1, 1)
    inputs = {"input_ids": ids, "labels": labels}
    learns = [p for p in model.parameters() if p.requires_grad]
    given = TrainingArguments(output_dir="nowhere", use_cpu=True, report_to="none")
    learner = Learner(model=model, args=given, anchor=0.3)
    loss = learner.compute_loss(model, inputs, num_items_in_batch=7)
    found = torch.autograd.grad(loss, learns)
    q = model(input_ids=ids).logits[:, -9:-1].log_softmax(-1)[:, 3:]
    with torch.no_grad(), model.disable_adapter():
        p = model(input_ids=ids).logits[:, 3:-1].log_softmax(-1)
    surprise = -q.gather(-1, ids[:, 4:, None]).sum()
    right = (0.7 * surprise + 0.3 * (p.exp() * (p - q)).sum()) / 7
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    for one, other in zip(found, torch.autograd.grad(right, learns), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [{"label": "kind"}, {"method": "full"}])
def test_an_anchor_needs_what_was_said_before(stage: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="what was said before is not known"):
        wanted(Path("model"), Path("out"), Path("text"), stage={"anchor": 0.5, **stage})


@pytest.mark.parametrize("name", ["prefix", pytest.param("prompt", marks=SLOW), "p-tuning"])
def test_before_is_the_model_alone(name: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """As `eval` measures it on the same rows, and not behind a prompt that has learned nothing."""
    recipe = wanted(tiny("llama"), tmp_path / "out", text_file, {"name": name, **METHODS[name]}, max_steps=12, hold=0.5)
    seen: list[list[Tensor]] = []

    def look(self: Examples, held: int) -> Any:
        parts = split(self, held)
        seen.append([parts[1][i]["input_ids"] for i in range(len(parts[1]))])
        return parts

    split = Examples.parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Examples, "parts", look)
        trained = done(recipe).trained
    model = load(tiny("llama"))[0]
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in seen[-1]]
    assert trained is not None and trained.held_before == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("stage", [{}, {"merge": True}])
def test_what_gains_nothing_is_told(
    stage: dict[str, Any], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """A rate at which nothing moves: beside the model and in its weights."""
    recipe = wanted(tiny("llama"), tmp_path / "out", text_file, stage=stage, rate=1e-12, max_steps=12, hold="20%")
    report = run.execute(
        recipe.model_copy(update={"run": recipe.run.model_copy(update={"strict": True})}), progress=Silent()
    )
    (told,) = [event for event in report.events if event.kind == "not_learned"]
    assert "training made nothing better" in told.message
    with pytest.raises(GateError, match="--strict: 1 event"):
        run.check_gates(report)


def test_what_is_no_number_ends_it(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    recipe = wanted(tiny("llama"), tmp_path / "out", text_file, rate=0.99, schedule="constant", max_steps=400, clip=1e9)
    with pytest.raises(InputError, match=r"The loss of step \d+ is no number; its rows begin with the tokens \[\["):
        broken = Learner.training_step

        def once(self: Learner, model: torch.nn.Module, *given: Any) -> Tensor:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
            return broken(self, model, *given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "training_step", once)
            done(recipe)
