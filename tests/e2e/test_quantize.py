"""From recipe to folder: overrides, refusals, evaluation, events."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoded_model, logits, recipe
from safetensors.torch import load_file, save_file
from test_families import exact

from llmshrink import run
from llmshrink.checks import written
from llmshrink.engine.hidden import Hidden
from llmshrink.errors import GateError, InputError, PlanError, ResourceError
from llmshrink.evaluate import measure
from llmshrink.evaluate.reader import ReadResult
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.schema import ModelSpec
from llmshrink.recipe.stages import EvalStage


@pytest.mark.parametrize(
    ("family", "stage", "words"),
    [
        ("gpt2", {"method": {"name": "gptq", "bits": 4, "group_size": 32}}, "Conv1D"),
        ("gpt-neox", {"method": {"name": "rtn", "group_size": 32}, "format": {"name": "awq"}}, "scales of activations"),
        ("falcon", {"layers": {".*dense": {"bits": 8}}}, "one scheme"),
        ("llama", {"method": {"name": "nf4"}, "format": {"name": "compressed-tensors"}}, "level tables"),
        ("llama", {"method": {"name": "gptq", "group_size": 48}}, "does not divide"),
        ("llama", {"layers": {"nothing.*": {"bits": 8}}}, "matches no layer"),
        ("llama", {"ignore": [".*"]}, "leaves out every layer"),
    ],
)
def test_what_no_loader_reads_is_refused_before_compute(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str, stage: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        run.execute(recipe(models_folder(family), tmp_path / "out", text_file, stage=stage), progress=Silent())
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_layers_may_differ_and_be_left_out(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    stage = {
        "layers": {".*down_proj": {"bits": 8}, ".*k_proj": None},
        "ignore": [r"model\.layers\.1\.self_attn\.o_proj"],
    }
    source, out = models_folder("llama"), tmp_path / "out"
    method = {"name": "rtn", "bits": 4, "group_size": 32}
    report = run.execute(recipe(source, out, text_file, method, stage=stage), progress=Silent())
    done = [layer for layer in report.stages[0].layers if layer.method]
    bits = {layer.name.removeprefix("model.layers."): layer.bits for layer in done}
    assert bits["0.mlp.down_proj"] == 8 and bits["0.mlp.up_proj"] == 4
    assert "0.self_attn.k_proj" not in bits and "1.self_attn.o_proj" not in bits and "0.self_attn.o_proj" in bits
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.self_attn.o_proj" in config["ignore"] and "lm_head" in config["ignore"]
    theirs, ours = logits(exact(out)[0]), logits(decoded_model(out, source))
    assert (ours - theirs).abs().max() <= 1e-5 * ours.std()


def test_a_group_size_nobody_typed_gives_way(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = run.execute(
        recipe(models_folder("qwen3-moe"), tmp_path / "out", text_file, {"bits": 4}), progress=Silent()
    )
    sizes = {layer.name: layer.group_size for layer in report.stages[0].layers}
    assert sizes["model.layers.0.self_attn.q_proj"] is None or sizes["model.layers.0.self_attn.q_proj"] == 64
    assert sizes["model.layers.1.mlp.down_proj"] == 32  # width 96
    assert any(e.kind == "group_size" for e in report.events)


def test_starved_experts_fall_back_and_say_so(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    few = {"samples": 1, "length": 24}
    method = {"name": "gptq", "bits": 4, "group_size": 32}
    report = run.execute(
        recipe(models_folder("qwen3-moe"), tmp_path / "out", text_file, method, calibration=few), progress=Silent()
    )
    starved = {e.layer for e in report.events if e.kind == "expert_fallback"}
    assert len(starved) == 4 * 3  # 24 tokens, two experts each: none of the four sees 64
    by_name = {layer.name: layer for layer in report.stages[0].layers}
    assert all(by_name[name].method == "rtn" and by_name[name].fallback for name in starved if name)
    assert by_name["model.layers.0.self_attn.q_proj"].method == "gptq"


def test_tokenizer_and_generation_files_are_byte_equal(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source, out = models_folder("llama"), tmp_path / "out"
    run.execute(recipe(source, out, text_file, {"name": "rtn"}), progress=Silent())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert {p.name for p in out.iterdir()} >= {"README.md", "recipe.yaml", "report.json", "llmshrink-manifest.json"}
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]


def test_verify_accepts_the_output_and_sees_a_changed_byte(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run.execute(recipe(models_folder("llama"), out, text_file, {"name": "rtn"}), progress=Silent())
    assert all(check.passed for check in run.verify(out, progress=Silent()))
    path = out / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    assert not all(check.passed for check in run.verify(out, progress=Silent()))


def test_smoke_compresses_one_block_of_each_family(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    for family in ("llama", "gpt2", "qwen3-moe"):
        checks = run.smoke(recipe(models_folder(family), tmp_path / family, text_file), progress=Silent())
        assert {"blocks", "reader"} <= {c.name for c in checks} and all(c.passed for c in checks)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_before_and_after(
    models_folder: Callable[..., Path], text_file: Path, other_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluation = {"data": [str(other_text), str(text_file)], "rows": 6, "length": 32, "speed": True}
    method = {"name": "gptq", "bits": 3, "group_size": 64}
    report = run.execute(
        recipe(models_folder("llama"), out, text_file, method, evaluation=evaluation), progress=Silent()
    )
    assert report.before is not None and report.after is not None
    assert [s.kl for s in report.before.scores] == [None, None]
    assert all(s.kl is not None and s.kl > 0 and 0 < (s.top1 or 0) < 1 for s in report.after.scores)
    assert report.after.tensor_bytes < report.before.tensor_bytes  # type: ignore[operator]
    assert (report.after.decode_tokens_per_second or 0) > 0 and report.after.sample is not None
    assert [e.kind for e in report.events] == ["shared_corpus"]
    assert json.loads((out / "report.json").read_text())["after"]["scores"][0]["tokens"] == 6 * 31


def test_each_stage_has_its_entry(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    wanted = recipe(
        models_folder("llama"),
        tmp_path / "out",
        text_file,
        {"name": "rtn"},
        evaluation={"data": [str(text_file)], "rows": 2, "length": 16, "speed": False},
    )
    both = wanted.model_copy(update={"stages": [*wanted.stages, EvalStage(task="eval")]})
    first, second = run.execute(both, progress=Silent()).stages
    assert (first.task, second.task) == ("quantize", "eval")
    assert second.bytes_before == second.bytes_after == first.bytes_after
    assert second.seconds["evaluate"] > 0 and second.format == first.format
    only = run.execute(wanted.model_copy(update={"stages": both.stages[1:]}), progress=Silent())
    assert [stage.task for stage in only.stages] == ["eval"] and only.stages[0].format == "dense"


def test_tensors_without_a_parameter_are_told(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models_folder("llama"), folder)
    path = folder / "model.safetensors"
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    plan = run.make_plan(recipe(folder, tmp_path / "out", text_file, {"name": "rtn"}))
    (told,) = [event.message for event in plan.events if event.kind == "unused_tensors"]
    assert told.startswith("2 tensors") and all(name in told for name in more)


def test_eval_compares_with_a_baseline(
    models_folder: Callable[..., Path], text_file: Path, other_text: Path, tmp_path: Path
) -> None:
    source, out = models_folder("llama"), tmp_path / "out"
    evaluation = {"data": [str(other_text)], "rows": 3, "length": 24, "speed": False}
    made = run.execute(
        recipe(source, out, text_file, {"name": "rtn", "bits": 3}, evaluation=evaluation), progress=Silent()
    )
    beside = recipe(out, tmp_path / "no", text_file, evaluation={**evaluation, "baseline": str(source)})
    alone = beside.model_copy(update={"stages": [EvalStage(task="eval")]})
    report = run.execute(alone, progress=Silent())
    assert report.after is not None and made.after is not None
    assert report.after.scores[0].kl == pytest.approx(made.after.scores[0].kl, rel=1e-4)
    assert report.before is not None and report.before.tensor_bytes > report.after.tensor_bytes  # type: ignore[operator]
    with pytest.raises(PlanError, match=r"evaluation\.baseline is for `llmshrink eval`"):
        run.execute(beside.model_copy(update={"model": ModelSpec(id=str(source))}), progress=Silent())


def test_layers_that_are_left_stand_in_the_report(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    stage = {"on_indivisible": "skip", "ignore": [".*k_proj"]}
    method = {"name": "rtn", "group_size": 128}  # widths 64 and 128: only down_proj has whole groups
    report = run.execute(
        recipe(models_folder("llama"), tmp_path / "out", text_file, method, stage=stage), progress=Silent()
    )
    done = {layer.name.rpartition(".")[2]: layer for layer in report.stages[0].layers}
    assert [name for name, layer in done.items() if layer.method] == ["down_proj"]
    assert "does not divide" in (done["up_proj"].reason or "") and "recipe" in (done["k_proj"].reason or "")
    assert done["up_proj"].bits_per_weight == 32 and done["up_proj"].bytes_after == done["up_proj"].bytes_before
    assert [e.kind for e in report.events if e.kind == "skipped"]


def test_the_card_names_no_path_of_this_machine(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = models_folder("llama")
    run.execute(recipe(source, tmp_path / "out", text_file, {"name": "gptq", "group_size": 32}), progress=Silent())
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(source.parent) not in card and str(text_file.parent) not in card and str(tmp_path) not in card
    assert source.name in card and text_file.name in card
    assert str(source) in (tmp_path / "out" / "recipe.yaml").read_text()  # which is for running it again


def test_memory_that_runs_out_is_told_as_such(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Hidden, "advance", fail)
    wanted = recipe(models_folder("llama"), tmp_path / "out", text_file, {"name": "rtn"})
    with pytest.raises(ResourceError, match=r"Memory ran out: CUDA out of memory.*\n.*batch_tokens") as caught:
        run.execute(wanted, progress=Silent())
    assert caught.value.exit_code == 6


def test_a_reader_that_was_killed_is_no_verdict(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = ReadResult(error="the reader died: SIGKILL", unable=True)
    monkeypatch.setattr(written, "measure", lambda *_: [killed])
    report = run.execute(
        recipe(models_folder("llama"), tmp_path / "out", text_file, {"name": "rtn"}), progress=Silent()
    )
    (check,) = [check for check in report.stages[0].checks if check.name == "reader"]
    assert check.passed is None and "SIGKILL" in check.detail
    assert [event.kind for event in report.events if event.kind != "group_size"] == ["not_verified"]
    monkeypatch.setattr(written, "available_memory", lambda: 1000)
    checks = {check.name: check for check in run.verify(tmp_path / "out", progress=Silent())}
    assert checks["reader"].passed is None and "does not fit" in checks["reader"].detail


def test_strict_fails_on_events_and_keeps_the_result(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    wanted = recipe(models_folder("qwen3-moe"), tmp_path / "out", text_file, {"bits": 4}, run={"strict": True})
    report = run.execute(wanted, progress=Silent())
    with pytest.raises(GateError, match="groups of 32"):
        run.check_gates(report)
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("broken", ["the result", "both"])
def test_what_cannot_be_scored_is_kept_and_told(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    score = measure.score_texts

    def fail(base: StreamedModel, other: StreamedModel | None, *args: Any, **more: Any) -> Any:
        if other is not None or broken == "both":
            raise InputError("the logits are not finite")
        return score(base, other, *args, **more)

    monkeypatch.setattr(measure, "score_texts", fail)
    evaluation = {"data": [str(text_file)], "rows": 2, "length": 16}
    wanted = recipe(models_folder("llama"), tmp_path / "out", text_file, {"name": "rtn"}, evaluation=evaluation)
    report = run.execute(wanted, progress=Silent())
    told = [event.message for event in report.events if event.kind == "not_measured"]
    models = ["the result", "the original"] if broken == "both" else ["the result"]
    assert told == [f"quality of {model}: the logits are not finite" for model in models]
    assert report.before is not None and report.after is not None
    assert report.after.scores == [] and len(report.before.scores) == (broken != "both")
    assert (tmp_path / "out" / "report.json").exists()
