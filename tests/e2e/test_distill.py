"""Distillation from end to end: a smaller model, taught by the larger one, that loads anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, content, load, logits, recipe
from tiny import build_model, config
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from llmshrink import run
from llmshrink.errors import InterruptedRun, PlanError, UsageError
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe
from llmshrink.report.schema import Report

# By the teacher alone, who has seen none of the text.
TAUGHT: dict[str, Any] = {"loss": {"alpha": 1.0, "temperature": 1.0}}
pytestmark = pytest.mark.usefixtures("without_reader")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    build_model(folder, config("llama", num_hidden_layers=3, **small))
    return folder


def wanted(model: Path, out: Path, text: Path, stage: dict[str, Any] | None = None, **train: Any) -> Recipe:
    steps = {"data": str(text), "length": 16, "batch": 2, "max_steps": 6, "rate": 1e-3, **train}
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [
                {"task": "distill", "student": {"layers": [0, 2], "repair": False}, "train": steps, **(stage or {})}
            ],
            "evaluation": {"data": [], "speed": False},
            "output": str(out),
        }
    )


def test_a_student_learns_and_is_written(deep: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run.execute(wanted(deep, out, text_file, TAUGHT, max_steps=30, rate=1e-2), progress=Silent())
    (stage,) = report.stages
    assert stage.bytes_after == stage.planned_bytes_after < stage.bytes_before and stage.cut is not None
    assert stage.task == "distill" and all(check.passed for check in stage.checks)
    assert "not_learned" not in kinds(report)
    trained = stage.trained
    assert trained is not None and trained.steps == 30 and trained.tokens == 30 * 2 * 16
    assert (
        trained.held_before is not None
        and trained.held_after is not None
        and trained.held_after < 0.7 * trained.held_before
    )
    assert {point.kind for point in trained.curve} == {"loss", "held"}
    model, info = load(out)
    assert model.config.num_hidden_layers == 2 and not info["missing_keys"]
    assert logits(model).isfinite().all()
    assert not (out / ".work").exists()


def test_a_stopped_run_gives_the_same_bytes(deep: Path, text_file: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    first = run.execute(wanted(deep, whole, text_file), progress=Silent())
    for note in ("step 3 of 6", "step 5 of 6"):
        with pytest.raises(InterruptedRun):
            run.execute(wanted(deep, out, text_file), progress=Stopping(step="distill", note=note))
    again = run.execute(wanted(deep, out, text_file), progress=Silent())
    assert content(out) == content(whole)
    curves = [report.stages[0].trained and report.stages[0].trained.curve for report in (first, again)]
    assert curves[0] == curves[1]


def test_a_student_is_repaired_with_the_text_it_learns(deep: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"student": {"layers": [0, 2]}}
    found = run.execute(wanted(deep, tmp_path / "whole", text_file, stage, max_steps=2), progress=Silent())
    (told,) = [event for event in found.events if "calibration" in event.kind]
    assert (told.kind, told.message) == ("train_calibration", f"calibrated on the text to train on: {text_file.name}")
    out = tmp_path / "stopped"
    with pytest.raises(InterruptedRun):  # in the making of the student
        run.execute(wanted(deep, out, text_file, stage, max_steps=2), progress=Stopping(step="compress"))
    again = run.execute(wanted(deep, out, text_file, stage, max_steps=2), progress=Silent())
    assert weights(out) == weights(tmp_path / "whole")
    assert [event.message for event in again.events if event.kind == "train_calibration"] == [told.message]


def test_another_model_teaches(deep: Path, text_file: Path, tmp_path: Path) -> None:
    student, out = tmp_path / "student", tmp_path / "out"
    build_model(student, config("llama", hidden_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=168))
    data = {"data": [str(text_file)], "rows": 2, "length": 16}
    made = wanted(student, out, text_file, {**TAUGHT, "teacher": str(deep), "student": None}, max_steps=30, rate=1e-2)
    report = run.execute(
        made.model_copy(update={"evaluation": made.evaluation.model_validate({**data, "speed": False})}),
        progress=Silent(),
    )
    (stage,) = report.stages
    assert stage.trained is not None and stage.trained.teacher == str(deep)
    assert stage.trained.held_after < stage.trained.held_before and report.after is not None  # type: ignore[operator]
    assert report.after.scores[0].kl is not None and report.model.id == str(student)


def test_less_is_kept_on_the_way(deep: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, state: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return forward(self, state)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    found = []
    for checkpointing in (False, True):
        calls.clear()
        out = tmp_path / str(checkpointing)
        run.execute(wanted(deep, out, text_file, checkpointing=checkpointing), progress=Silent())
        found.append((weights(out), sum(calls)))
    assert found[0][0] == found[1][0] and found[1][1] == 2 * found[0][1] == 2 * 2 * 6  # layers, steps


def test_it_ends_when_its_time_is_up(deep: Path, text_file: Path, tmp_path: Path) -> None:
    report = run.execute(wanted(deep, tmp_path / "out", text_file, max_minutes=1e-6), progress=Silent())
    assert report.stages[0].trained is not None and report.stages[0].trained.steps == 1


def test_it_ends_where_nothing_is_gained(deep: Path, text_file: Path, tmp_path: Path) -> None:
    steps = {"max_steps": 40, "evaluations": 20, "rate": 0.9, "schedule": "constant", "hold": "20%"}
    found = {}
    for patience in (2, None):
        report = run.execute(
            wanted(deep, tmp_path / str(patience), text_file, {"loss": {"alpha": 0.5}}, **steps, patience=patience),
            progress=Silent(),
        )
        assert report.stages[0].trained is not None
        found[patience] = report.stages[0].trained
        assert "not_learned" in kinds(report)
    early, late = found[2], found[None]
    assert early.steps < late.steps == 40
    held = [point.value for point in early.curve if point.kind == "held"]
    assert early.held_after == pytest.approx(min(held[:-1]), rel=1e-3), held


class Killed(Silent):
    """Ends as a kill does: nobody is told before."""

    def __init__(self, note: str) -> None:
        self._note = note

    def advance(self, amount: int, note: str = "") -> None:
        if note.startswith(self._note):
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_from_what_was_saved(deep: Path, text_file: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run.execute(wanted(deep, whole, text_file), progress=Silent())
    seen: list[str] = []

    class Noting(Silent):
        def advance(self, amount: int, note: str = "") -> None:
            seen.append(note)

    for minutes, left in ((1e-6, ["step 5 of 6", "step 6 of 6"]), (60.0, [f"step {n} of 6" for n in range(1, 7)])):
        with pytest.raises(KeyboardInterrupt):
            run.execute(wanted(deep, out, text_file, save_minutes=minutes), progress=Killed("step 5"))
        seen.clear()
        run.execute(wanted(deep, out, text_file, save_minutes=minutes), progress=Noting())
        assert [note for note in seen if note.startswith("step")] == left
        assert weights(out) == weights(whole)
        shutil.rmtree(out)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_what_cannot_be_learned_is_refused(deep: Path, text_file: Path, tmp_path: Path) -> None:
    other = shutil.copytree(deep, tmp_path / "other")
    said = json.loads((other / "tokenizer.json").read_text())
    said["added_tokens"].append({**said["added_tokens"][0], "id": 160, "content": "<more>"})
    (other / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(PlanError, match=r"reads other tokens than .*: it knows 161 tokens, and .* 160\."):
        run.make_plan(wanted(deep, tmp_path / "out", text_file, {"teacher": str(other)}))
    quantized = tmp_path / "quantized"
    run.execute(recipe(deep, quantized, text_file, {"name": "rtn", "bits": 8, "group_size": 32}), progress=Silent())
    for changes, why in (({"teacher": str(quantized)}, "teachers are read as floats"), ({}, "codes cannot be trained")):
        model = deep if changes else quantized
        with pytest.raises(PlanError, match=why):
            run.make_plan(wanted(model, tmp_path / "out", text_file, changes))
    with pytest.raises(UsageError, match="training has none"):
        run.smoke(wanted(deep, tmp_path / "out", text_file), progress=Silent())
    with pytest.raises(PlanError, match="nothing to learn"):
        run.make_plan(wanted(deep, tmp_path / "out", text_file, {"student": None}))


def sparse(model: Path, out: Path, text: Path, fmt: str, **method: Any) -> Path:
    made = recipe(model, out, text, {"name": "magnitude", "sparsity": 0.5, **method}, stage={"format": {"name": fmt}})
    run.execute(made, progress=Silent())
    return out


@pytest.mark.parametrize(("fmt", "method"), [("sparse", {}), ("sparse", {"pattern": "2:4"}), ("dense", {})])
def test_a_pruned_student_keeps_its_zeros(
    deep: Path, text_file: Path, tmp_path: Path, fmt: str, method: dict[str, Any]
) -> None:
    student, out = sparse(deep, tmp_path / "student", text_file, fmt, **method), tmp_path / "out"
    made = wanted(student, out, text_file, {**TAUGHT, "teacher": str(deep), "student": None}, max_steps=12)
    report = run.execute(made, progress=Silent())
    (stage,), before, after = report.stages, weights_of(student), weights_of(out)
    assert stage.format == fmt and stage.bytes_after == stage.bytes_before == stage.planned_bytes_after
    assert all(check.passed for check in stage.checks) and not {"zeros_lost", "decompressed"} & kinds(report)
    assert before.keys() == after.keys() and stage.trained is not None
    for name, weight in after.items():
        assert not weight[before[name] == 0].any() and not torch.equal(weight, before[name]), name
    assert [one.before for one in stage.trained.zeros] == [layer.parameters // 2 for layer in stage.layers]
    assert [one.after for one in stage.trained.zeros] == [layer.zeros for layer in stage.layers]
    assert [layer.bytes_before for layer in stage.layers] == [layer.bytes_after for layer in stage.layers]
    assert stage.trained.held_after < stage.trained.held_before  # type: ignore[operator]


def test_zeros_that_may_learn_are_written_dense(deep: Path, text_file: Path, tmp_path: Path) -> None:
    student, out = sparse(deep, tmp_path / "student", text_file, "sparse"), tmp_path / "out"
    taught = {**TAUGHT, "teacher": str(deep), "student": None}
    report = run.execute(wanted(student, out, text_file, taught, keep_zeros=False), progress=Silent())
    (stage,), before, after = report.stages, weights_of(student), weights_of(out)
    assert stage.format == "dense" and "decompressed" in kinds(report) and stage.bytes_after > stage.bytes_before
    assert stage.trained is not None and not stage.trained.zeros
    assert all(weight[before[name] == 0].any() for name, weight in after.items() if "proj" in name)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_what_has_no_zeros_to_keep_is_refused(deep: Path, text_file: Path, tmp_path: Path) -> None:
    taught = {**TAUGHT, "teacher": str(deep), "student": None}
    with pytest.raises(PlanError, match="has no zeros that could stay"):
        run.make_plan(wanted(deep, tmp_path / "out", text_file, taught, keep_zeros=True))
    coded = tmp_path / "coded"
    method = {"name": "sparsegpt", "sparsity": 0.5, "bits": 4, "group_size": 32}
    run.execute(recipe(deep, coded, text_file, method), progress=Silent())
    with pytest.raises(PlanError, match="stored as sparse: codes cannot be trained"):
        run.make_plan(wanted(coded, tmp_path / "out", text_file, taught))


def weights_of(folder: Path) -> dict[str, Tensor]:
    weights = StreamedModel(open_source(str(folder)), torch.device("cpu")).weights
    return {name: weights.dense(name).clone() for name in weights.infos}


def kinds(report: Report) -> set[str]:
    return {event.kind for event in report.events}
