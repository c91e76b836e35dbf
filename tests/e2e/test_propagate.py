"""Runs whose layers make up for the blocks before them: a stopped one goes on, what cannot be is refused or told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Stopping, content, recipe

from llmshrink import run
from llmshrink.errors import InterruptedRun, PlanError
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("without_reader")


def wanted(model: Path, out: Path, text: Path, share: float = 0.5, sequential: str = "block") -> Recipe:
    method = {"name": "gptq", "bits": 2, "group_size": 32, "propagate": share}
    return recipe(model, out, text, method, run={"threads": 1, "batch_tokens": 32, "sequential": sequential})


def test_the_first_block_stays_and_later_ones_change(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    errors = []
    for share in (0.0, 0.5):
        report = run.execute(wanted(smallest, tmp_path / str(share), text_file, share), progress=Silent())
        assert all(check.passed for check in report.stages[0].checks)
        errors.append({layer.name: layer.relative_error for layer in report.stages[0].layers})
    plain, shifted = errors
    changed = {name.split(".layers.")[1][0] for name in plain if plain[name] != shifted[name]}
    assert changed == {"1"}


@pytest.mark.parametrize("save", [False, True])
def test_a_stopped_run_gives_the_same_bytes(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: bool
) -> None:
    run.execute(wanted(smallest, tmp_path / "whole", text_file), progress=Silent())
    monkeypatch.setattr("llmshrink.engine.compress.SAVE_EVERY", 0.0 if save else 60.0)
    with pytest.raises(InterruptedRun):
        run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Stopping(note="block"))
    report = run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Silent())
    assert report.stages[0].resumed_blocks == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_head_has_the_original_s_inputs_too(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    heads = []
    for share in (0.0, 0.5):
        method = {"name": "gptq", "propagate": share}
        stage = {"format": {"type": "Q4_0"}}
        wanted = recipe(smallest, tmp_path / str(share), text_file, method, stage=stage)
        (found,) = run.execute(wanted, progress=Silent()).stages
        heads.append(next(layer.relative_error for layer in found.layers if layer.name == "lm_head"))
    assert heads[0] != heads[1]


def test_experts_are_left_out_and_that_is_told(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = run.execute(wanted(models_folder("qwen3-moe"), tmp_path / "out", text_file), progress=Silent())
    assert all(check.passed for check in report.stages[0].checks)
    (event,) = [event for event in report.events if event.kind == "not_propagated"]
    assert "leaves out experts" in event.message


def test_a_block_that_is_partly_compressed_is_refused(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="needs the original block") as refused:
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, sequential="subset"))
    assert "--sequential block" in str(refused.value.hint)
