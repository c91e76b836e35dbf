"""Trackers are told as a training goes, and nothing of them is in the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from llmshrink import run
from llmshrink.plan.trackers import PACKAGES
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.train import Tracker

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
