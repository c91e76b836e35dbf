"""Runs that are tuned from end to end: nothing gets worse, a stopped run goes on, what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, content, recipe

from llmshrink import run
from llmshrink.engine.tune import Tuner
from llmshrink.errors import GateError, InterruptedRun, PlanError
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe
from llmshrink.report.rows import stage_lines
from llmshrink.report.schema import Report, TuneReport

pytestmark = pytest.mark.usefixtures("without_reader")
STEPS = {"steps": 12, "tokens": 64, "rate": 0.01, "norm_rate": 0.01}
METHOD = {"name": "rtn", "bits": 2, "group_size": 32}


def wanted(model: Path, out: Path, text: Path, method: dict[str, Any] | None = None, **more: Any) -> Recipe:
    stage = {"tune": STEPS, **more.pop("stage", {})}
    small = {"calibration": {"samples": 24, "length": 16}, "run": {"threads": 1, "batch_tokens": 32}}
    return recipe(model, out, text, method or METHOD, stage=stage, **{**small, **more})


def tuned(report: Report) -> TuneReport:
    (stage,) = report.stages
    assert all(check.passed for check in stage.checks) and stage.tuned is not None
    return stage.tuned


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in content(folder).items() if name.endswith(".safetensors")}


def test_the_report_says_what_it_gained(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    plain, wish = tmp_path / "plain", wanted(smallest, tmp_path / "out", text_file)
    run.execute(wanted(smallest, plain, text_file, stage={"tune": None}), progress=Silent())
    assert run.make_plan(wish).tuning_steps == 12
    report = run.execute(wish, progress=Silent())
    found = tuned(report)
    assert found.kl_after < found.kl_before and found.steps == 12 and found.tokens_held == 64
    assert any("scales and norms tuned in 12 steps: KL 0." in line for line in stage_lines(report.stages[0]))
    (copied,) = [check for check in report.stages[0].checks if check.name == "copied"]
    assert "5 are tuned" in copied.detail  # two norms in each of two blocks, and the last
    old, new = (StreamedModel(open_source(str(folder)), torch.device("cpu")) for folder in (plain, tmp_path / "out"))
    changed = [
        k for k in old.source.checkpoint.infos if not torch.equal(*(m.source.checkpoint.get(k) for m in (old, new)))
    ]
    assert changed and all(k.endswith(("weight_scale", "norm.weight")) for k in changed)
    assert any(key.endswith("weight_scale") for key in changed)


def test_nothing_worse_is_taken_over(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.execute(wanted(smallest, tmp_path / "plain", text_file, stage={"tune": None}), progress=Silent())
    scores = iter([1.0, 1.0, 1.5])
    monkeypatch.setattr(Tuner, "score", lambda _: next(scores))
    report = run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Silent())
    found = tuned(report)
    assert found.kl_after == found.kl_before and found.steps == 0
    assert [event.kind for event in report.events if event.kind == "not_tuned"]
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


@pytest.mark.parametrize("steps", [1, 7, 12])
def test_a_stopped_run_gives_the_same_bytes(smallest: Path, text_file: Path, tmp_path: Path, steps: int) -> None:
    whole = run.execute(wanted(smallest, tmp_path / "whole", text_file), progress=Silent())
    with pytest.raises(InterruptedRun):
        run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Stopping(steps, note="KL"))
    progress = _Counting()
    report = run.execute(wanted(smallest, tmp_path / "out", text_file), progress=progress)
    assert progress.steps == 12 - steps and tuned(report) == tuned(whole)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


class _Counting(Silent):
    """Counts steps of tuning."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, amount: int, note: str = "") -> None:
        self.steps += note.startswith("KL")


@pytest.mark.parametrize("lost", [False, True])
def test_what_was_tuned_is_not_tuned_again(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """The run ends after it, and the file of what it found is there or not."""
    run.execute(wanted(smallest, tmp_path / "whole", text_file), progress=Silent())
    with monkeypatch.context() as patch, pytest.raises(InterruptedRun):
        patch.setattr("llmshrink.job.finish_files", _interrupted)
        run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Silent())
    (found,) = (tmp_path / "out.partial").rglob("tuned.safetensors")
    if lost:
        found.unlink()
    progress = _Counting()
    report = run.execute(wanted(smallest, tmp_path / "out", text_file), progress=progress)
    assert progress.steps == (12 if lost else 0)
    assert ("work_lost" in [event.kind for event in report.events]) == lost
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def _interrupted(*_: object) -> None:
    raise InterruptedRun("stopped")


@pytest.mark.parametrize("family", ["qwen3-moe", "gemma2", "qwen2"])
def test_other_families(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str) -> None:
    found = tuned(run.execute(wanted(models_folder(family), tmp_path / "out", text_file), progress=Silent()))
    assert found.kl_after < found.kl_before


@pytest.mark.parametrize(
    ("method", "stored_as"),
    [
        ({**METHOD, "bits": 4}, "gptq"),
        ({**METHOD, "bits": 4, "symmetric": False}, "awq"),
        ({**METHOD, "symmetric": False}, "compressed-tensors"),
        ({"name": "fp8"}, None),
    ],
)
def test_other_formats(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, method: dict[str, Any], stored_as: str | None
) -> None:
    stage = {"format": stored_as and {"name": stored_as}}
    model = models_folder("llama", torch.float16)
    wish = wanted(model, tmp_path / "out", text_file, method, stage=stage)
    if stored_as is None:
        with pytest.raises(PlanError, match="stores no scales of fp8"):
            run.make_plan(wish)
        return
    found = tuned(run.execute(wish, progress=Silent()))
    assert found.kl_after < found.kl_before


def test_after_a_reconstruction_and_with_states_in_files(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"reconstruct": {"steps": 10, "tokens": 64}}
    found = tuned(run.execute(wanted(smallest, tmp_path / "whole", text_file, stage=stage), progress=Silent()))
    assert found.kl_after < found.kl_before
    monkeypatch.setattr("llmshrink.engine.budget.choose", lambda needed, economies, limit: (list(economies)[1], 0))
    run.execute(wanted(smallest, tmp_path / "out", text_file, stage=stage), progress=Silent())
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("stored_as", ["dense", "gguf"])
def test_a_format_without_scales_is_refused(smallest: Path, text_file: Path, tmp_path: Path, stored_as: str) -> None:
    method = {"name": "rtn"} if stored_as == "gguf" else METHOD
    stage = {"format": {"name": stored_as, "type": "Q8_0" if stored_as == "gguf" else None}}
    with pytest.raises(PlanError, match=f"{stored_as} stores no scales"):
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, method, stage=stage))
    plan = run.make_plan(
        wanted(smallest, tmp_path / "out", text_file, method, stage={**stage, "tune": {"optional": True}})
    )
    assert not plan.tuning_steps and "not_tuned" in [event.kind for event in plan.events]


def test_an_encoder_without_logits_is_refused(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="gives out hidden states"):
        run.make_plan(wanted(models_folder("bert"), tmp_path / "out", text_file))


def test_a_tuned_vector_that_was_written_otherwise_is_found(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink import output

    def spoiled(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        return write(path, {k: v * 1.5 if k.endswith("norm.weight") else v for k, v in tensors.items()})

    write = output.write
    monkeypatch.setattr(output, "write", spoiled)
    with pytest.raises(GateError, match="copied: differ"):
        run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Silent())


def test_rows_are_held_back_from_a_single_batch_too(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    few = {"calibration": {"samples": 4, "length": 16}, "run": {"threads": 1, "batch_tokens": 64}}
    assert tuned(run.execute(wanted(smallest, tmp_path / "out", text_file, **few), progress=Silent())).tokens_held == 16
    one = {**few, "calibration": {"samples": 1, "length": 16}}
    report = run.execute(wanted(smallest, tmp_path / "one", text_file, **one), progress=Silent())
    assert tuned(report).tokens_held == 16 and "not_held" in {event.kind for event in report.events}
