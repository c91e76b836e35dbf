"""Trackers are told as a training goes, and nothing of them is in the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from llmshrink import run
from llmshrink.engine.workspace import Workspace
from llmshrink.plan.trackers import PACKAGES
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.train import Tracker
from llmshrink.train.run import _curve, _Journal

pytestmark = pytest.mark.usefixtures("without_reader")


def wanted(model: Path, out: Path, text: Path, tracker: str) -> Recipe:
    steps = {"data": str(text), "length": 16, "batch": 8, "max_steps": 3, "report_to": [tracker]}
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{"task": "distill", "student": {"layers": [0], "repair": False}, "train": steps}],
            "evaluation": {"data": [], "speed": False},
            "output": str(out),
        }
    )


def test_a_curve_is_of_all_steps() -> None:
    log = [{"step": step, "loss": float(step)} for step in range(1, 251)]
    log += [{"step": 100, "eval_loss": 7.0}, {"step": 250, "eval_loss": 5.0}, {"step": 250, "train_loss": 3.0}]
    points = [(p.step, p.kind, p.value) for p in _curve(TrainerState(log_history=log), 250)]  # type: ignore[arg-type]
    means = [(step, "loss", step - 0.5) for step in range(2, 251, 2)]
    held = [(100, "held", 7.0), (250, "held", 5.0)]
    assert sorted(points) == sorted([*means, *held]) and [p[0] for p in points] == sorted(p[0] for p in points)


def test_seconds_go_on(tmp_path: Path) -> None:
    journal = _Journal(Workspace(tmp_path / "out"), Silent(), 5, 1.0, None)
    journal.goes_on({"seconds": 1000.0})
    assert 1000 <= journal.seconds < 1100
    journal.goes_on(None)
    assert 0 <= journal.seconds < 100


def test_every_tracker_is_one_of_transformers() -> None:
    known = set(integration_utils.INTEGRATION_TO_CALLBACK)
    assert set(get_args(Tracker)) == set(PACKAGES) == known - {"kubeflow"}  # which is no package, but a place


def test_a_tracker_is_told(smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_log(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
        ) -> None:
            assert args.run_name == "out"
            seen.extend((state.global_step, key) for key in logs if key in ("loss", "eval_loss"))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Told)
    monkeypatch.setitem(PACKAGES, "trackio", (("json",), "json"))
    report = run.execute(wanted(smallest, tmp_path / "out", text_file, "trackio"), progress=Silent())
    trained = report.stages[0].trained
    assert trained is not None and {
        (p.step, "eval_loss" if p.kind == "held" else p.kind) for p in trained.curve
    } <= set(seen)
    assert {(3, "loss"), (3, "eval_loss")} <= set(seen)


def test_tensorboard_reads_the_course(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    report = run.execute(wanted(smallest, tmp_path / "out", text_file, "tensorboard"), progress=Silent())
    trained = report.stages[0].trained
    found = accumulator.EventAccumulator(str(tmp_path / "runs" / "out"))
    found.Reload()
    losses = [(point.step, point.value) for point in found.Scalars("train/loss")]
    assert trained is not None
    assert losses == [(p.step, pytest.approx(p.value, rel=1e-3)) for p in trained.curve if p.kind == "loss"]
    assert not list((tmp_path / "out").rglob("*tfevents*"))
