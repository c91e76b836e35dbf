"""All that makes for quality in one run: what works alone works together, stopped anywhere, to the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Stopping, content, recipe

from llmshrink import run
from llmshrink.errors import InterruptedRun
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("without_reader")
STAGE = {
    "transform": [{"name": "hadamard"}, {"name": "awq", "steps": 2}],
    "allocate": {"bpw": 15.5, "candidates": [{"bits": bits, "group_size": 32} for bits in (2, 3, 8)], "rows": 2},
    "reconstruct": {"steps": 8, "tokens": 64},
    "tune": {"steps": 6, "tokens": 64, "rate": 0.01, "norm_rate": 0.01},
}


def wanted(model: Path, out: Path, text: Path) -> Recipe:
    small = {"calibration": {"samples": 24, "length": 16}, "run": {"threads": 1, "batch_tokens": 32}}
    return recipe(model, out, text, {"name": "gptq", "propagate": 0.5}, stage=STAGE, **small)


@pytest.fixture(scope="module")
def whole(smallest: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together") / "whole"
    (stage,) = run.execute(wanted(smallest, out, text_file), progress=Silent()).stages
    assert all(check.passed for check in stage.checks)
    assert stage.allocation is not None and stage.tuned is not None
    assert len(stage.blocks) == 2 and {found.name for found in stage.transforms} == {"hadamard", "awq"}
    assert len({layer.bits for layer in stage.layers}) > 1
    return out


@pytest.mark.parametrize(("what", "times"), [("measure", 1), ("compress", 1), ("tune", 2)])
def test_it_goes_on_wherever_it_was_stopped(
    smallest: Path, text_file: Path, tmp_path: Path, whole: Path, what: str, times: int
) -> None:
    wish = wanted(smallest, tmp_path / "out", text_file)
    with pytest.raises(InterruptedRun):
        run.execute(wish, progress=Stopping(times, step=what))
    run.execute(wish, progress=Silent())
    assert content(tmp_path / "out") == content(whole)


def test_the_recipe_that_is_saved_measures_nothing_and_gives_the_same(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.recipe import load

    monkeypatch.setattr("llmshrink.sensitivity.measure.Sensitivity.measure", None)
    saved = load.override(load.read(str(whole / "recipe.yaml")), "output", str(tmp_path / "out"))
    run.execute(load.validate(saved), progress=Silent())
    weights = [
        {k: v for k, v in content(folder).items() if k.endswith(".safetensors")} for folder in (tmp_path / "out", whole)
    ]
    assert weights[0] == weights[1]
