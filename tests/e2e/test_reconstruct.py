"""Runs whose blocks are learned: the report says what it gained, a stopped run goes on, what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Stopping, content, recipe

from llmshrink import run
from llmshrink.cli import main
from llmshrink.cli.options import build_recipe
from llmshrink.errors import InterruptedRun, PlanError
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import QuantizeStage
from llmshrink.report.rows import stage_lines
from llmshrink.report.schema import Report, StageReport

pytestmark = pytest.mark.usefixtures("without_reader")
STEPS = {"steps": 30, "tokens": 64}


def wanted(model: Path, out: Path, text: Path, method: dict[str, Any] | None = None, **more: Any) -> Recipe:
    stage = {"format": {"name": "dense"}, "reconstruct": STEPS, **more.pop("stage", {})}
    small = {"calibration": {"samples": 24, "length": 16}, "run": {"threads": 1, "batch_tokens": 32}}
    method = method or {"name": "rtn", "bits": 2, "group_size": 32}
    return recipe(model, out, text, method, stage=stage, **{**small, **more})


def learned(report: Report) -> StageReport:
    (stage,) = report.stages
    assert all(check.passed for check in stage.checks)
    return stage


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in content(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("method", [{"name": "rtn", "bits": 2, "group_size": 32}, {"name": "gptq", "type": "Q4_0"}])
def test_the_report_says_what_each_block_gained(
    smallest: Path, text_file: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    assert run.make_plan(wanted(smallest, tmp_path / "out", text_file, method)).learning_steps == 30
    report = run.execute(wanted(smallest, tmp_path / "out", text_file, method), progress=Silent())
    stage = learned(report)
    assert any("2 blocks learned: their error is 0." in line for line in stage_lines(stage))
    assert [block.block for block in stage.blocks] == [0, 1]
    assert stage.blocks[0].error_after < stage.blocks[0].error_before and stage.blocks[0].codes_changed > 0
    changed = [layer for layer in stage.layers if layer.reconstructed]
    assert changed and all(layer.objective is None and layer.relative_error for layer in changed)


def test_nothing_worse_is_taken_over(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    run.execute(wanted(smallest, tmp_path / "plain", text_file, stage={"reconstruct": None}), progress=Silent())
    wild = {"steps": 2, "tokens": 32, "rate": 1.0, "scale_rate": 0.9}
    report = run.execute(wanted(smallest, tmp_path / "out", text_file, stage={"reconstruct": wild}), progress=Silent())
    assert all(block.error_after == block.error_before and not block.codes_changed for block in learned(report).blocks)
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe", "gemma2"])
def test_other_families_learn(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str) -> None:
    stage = learned(run.execute(wanted(models_folder(family), tmp_path / "out", text_file), progress=Silent()))
    assert stage.blocks[0].error_after < stage.blocks[0].error_before


def test_blocks_whose_scales_alone_moved_count_as_learned(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    still = {"steps": 20, "tokens": 64, "rate": 1e-9}
    report = run.execute(wanted(smallest, tmp_path / "out", text_file, stage={"reconstruct": still}), progress=Silent())
    stage = learned(report)
    assert not any(block.codes_changed for block in stage.blocks)
    assert any("blocks learned" in line and "stayed" not in line for line in stage_lines(stage))


@pytest.mark.parametrize("save", [False, True])
def test_a_stopped_run_gives_the_same_bytes(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: bool
) -> None:
    """Whether the states of both models were saved, or go through the finished block again."""
    run.execute(wanted(smallest, tmp_path / "whole", text_file), progress=Silent())
    monkeypatch.setattr("llmshrink.engine.compress.SAVE_EVERY", 0.0 if save else 60.0)
    with pytest.raises(InterruptedRun):
        run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Stopping(note="block"))
    report = run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Silent())
    assert report.stages[0].resumed_blocks == 1 and [b.block for b in report.stages[0].blocks] == [0, 1]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_states_in_a_file_give_the_same_bytes(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.execute(wanted(smallest, tmp_path / "whole", text_file), progress=Silent())
    monkeypatch.setattr("llmshrink.engine.budget.choose", lambda needed, economies, limit: (list(economies)[1], 0))
    run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Silent())
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_it_learns_with_inputs_that_are_rounded(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"inputs": "int8", "format": {"name": "compressed-tensors"}}
    method = {"name": "rtn", "bits": 8}
    found = learned(run.execute(wanted(smallest, tmp_path / "out", text_file, method, stage=stage), progress=Silent()))
    assert found.blocks[0].error_after < found.blocks[0].error_before


@pytest.mark.parametrize("method", ["nf4", "binary"])
def test_codes_of_a_table_and_without_a_zero_are_refused_before_any_compute(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, method: str
) -> None:
    other = wanted(models_folder("llama"), tmp_path / "out", text_file, {"name": method}, stage={"format": None})
    with pytest.raises(PlanError, match=f"learns integer codes, tables or floats in the blocks, and {method} has none"):
        run.make_plan(other)


def test_presets_are_names_for_keys(capsys: pytest.CaptureFixture[str]) -> None:
    def stage(**values: Any) -> QuantizeStage:
        (found,) = build_recipe("quantize", values).stages
        assert isinstance(found, QuantizeStage)
        return found

    assert stage(preset="best").reconstruct is not None and stage(preset="best").method is None
    tune = stage(preset="best").tune
    assert tune is not None and tune.optional and stage(preset="balanced") == stage()
    fast = stage(preset="fast", bits=3).method
    assert fast is not None and fast.name == "rtn" and fast.settings == {"bits": 3}
    kept = stage(recipe="gptq-w2g64-best", preset="best", set=["reconstruct.steps=9"]).reconstruct
    assert kept is not None and kept.steps == 9
    assert main(["quantize", "--preset", "fast", "--method", "gptq"]) == 2
    assert main(["quantize", "--preset", "finest"]) == 2
    assert "choose fast, balanced, best" in capsys.readouterr().err
