"""Distillation from end to end: a smaller model, taught by the larger one, that loads anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import Stopping, content, load, logits
from tiny import build_model, config

from llmshrink import run
from llmshrink.errors import InterruptedRun, PlanError
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe

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
    report = run.execute(wanted(deep, out, text_file, max_steps=30, rate=1e-2), progress=Silent())
    (stage,) = report.stages
    assert stage.task == "distill" and all(check.passed for check in stage.checks)
    trained = stage.trained
    assert trained is not None and trained.steps == 30 and trained.tokens == 30 * 2 * 16
    assert trained.kl_before is not None and trained.kl_after is not None and trained.kl_after < 0.7 * trained.kl_before
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


def test_what_cannot_be_learned_is_refused(deep: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nothing to learn"):
        run.make_plan(wanted(deep, tmp_path / "out", text_file, {"student": None}))
