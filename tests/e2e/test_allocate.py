"""Runs that choose each layer's settings to meet a size: the bytes, what is kept, what is told, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, Stopping, content, recipe

from llmshrink import run
from llmshrink.cli import main
from llmshrink.errors import GateError, InterruptedRun, ResourceError
from llmshrink.progress import Silent
from llmshrink.recipe.load import load
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import QuantizeStage
from llmshrink.report.rows import stage_lines
from llmshrink.report.schema import Report, StageReport
from llmshrink.sensitivity.measure import Sensitivity

pytestmark = pytest.mark.usefixtures("without_reader")
CANDIDATES = [{"bits": 2, "group_size": 32}, {"bits": 3, "group_size": 32}, {"bits": 8, "group_size": 32}]
SIZES = {"safetensors", "gguf"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "llmshrink"


def wanted(model: Path, out: Path, text: Path, method: dict[str, Any] | None = None, **more: Any) -> Recipe:
    allocate = {"bpw": 15.5, "candidates": CANDIDATES, "rows": 2, "length": 12, **more.pop("allocate", {})}
    stage = {"allocate": allocate, **more.pop("stage", {})}
    small = {name: SMALL[name] for name in ("calibration", "run")}
    return recipe(model, out, text, method or {"name": "gptq"}, stage=stage, **{**small, **more})


def done(report: Report) -> StageReport:
    (stage,) = report.stages
    assert all(check.passed for check in stage.checks)
    return stage


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix[1:] in SIZES)


def execute(wanted: Recipe, **how: Any) -> Report:
    return run.execute(wanted, progress=how.pop("progress", Silent()), **how)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were measured."""
    blocks: list[int] = []
    whole = Sensitivity._block

    def block(self: Sensitivity, block: Any, units: Any) -> Any:
        blocks.append(block.index)
        return whole(self, block, units)

    monkeypatch.setattr(Sensitivity, "_block", block)
    return blocks


@pytest.mark.parametrize("asked", [{"bpw": 15.5}, {"bpw": 16.25}, {"bpw": None, "size": 60_000}])
def test_a_size_is_met(smallest: Path, text_file: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    stage = done(execute(wanted(smallest, tmp_path / "out", text_file, allocate=asked)))
    found = stage.allocation
    assert found is not None and found.bytes <= found.asked_bytes
    if asked["bpw"] is None:
        assert found.bytes == size_of(tmp_path / "out") <= 60_000
    else:
        assert found.bytes == stage.bytes_after and stage.bits_per_weight <= asked["bpw"]
    assert found.bytes > 0.99 * found.asked_bytes
    chosen = [unit.scores[unit.candidates.index(unit.chosen or 0)] for unit in found.units]
    assert found.predicted == pytest.approx(sum(chosen))
    bits = {layer.name: layer.bits for layer in stage.layers}
    for unit in found.units:
        assert bits[unit.layers.partition(",")[0]] == CANDIDATES[unit.chosen or 0]["bits"]
    lines = stage_lines(stage)
    assert any(line.startswith("asked for ") and "% below" in line for line in lines)
    assert any("units of layers: W" in line and "add up to" in line for line in lines)


def test_the_recipe_that_is_saved_needs_no_measuring(
    smallest: Path, text_file: Path, tmp_path: Path, measured: list[int]
) -> None:
    execute(wanted(smallest, tmp_path / "out", text_file))
    assert measured == [0, 1]
    saved = load(str(tmp_path / "out" / "recipe.yaml"))
    (stage,) = saved.stages
    assert isinstance(stage, QuantizeStage) and stage.allocate is None and len(stage.layers) == 14
    execute(saved.model_copy(update={"output": str(tmp_path / "again")}))
    assert measured == [0, 1]
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_another_size_needs_no_measuring(
    smallest: Path, text_file: Path, tmp_path: Path, measured: list[int], cache: Path
) -> None:
    execute(wanted(smallest, tmp_path / "out", text_file))
    assert len(list(cache.iterdir())) == 2
    report = execute(wanted(smallest, tmp_path / "other", text_file, allocate={"bpw": 16.5}))
    assert measured == [0, 1] and "cached" in {event.kind for event in report.events}
    for change in ({"rows": 3}, {"score": "block"}, {"candidates": CANDIDATES[1:]}):
        execute(wanted(smallest, tmp_path / "other", text_file, allocate=change), overwrite=True)
    assert measured == [0, 1] * 4
    execute(wanted(smallest, tmp_path / "other", text_file, calibration={"samples": 5}), overwrite=True)
    assert measured == [0, 1] * 5


@pytest.mark.parametrize(
    ("step", "block"),
    [
        ("measure the candidates", 1),
        ("compress", 0),
        pytest.param("measure the candidates", 0, marks=pytest.mark.slow),
        pytest.param("compress", 1, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    smallest: Path, text_file: Path, tmp_path: Path, measured: list[int], step: str, block: int, monkeypatch: Any
) -> None:
    execute(wanted(smallest, tmp_path / "whole", text_file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other cache"))
    measured.clear()
    with pytest.raises(InterruptedRun):
        execute(wanted(smallest, tmp_path / "out", text_file), progress=Stopping(step=step, note=f"block {block}"))
    report = execute(wanted(smallest, tmp_path / "out", text_file))
    assert measured == [0, 1]
    assert report.stages[0].resumed_blocks == (block + 1 if step == "compress" else 0)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    report = execute(wanted(smallest, tmp_path / "out", text_file))
    assert "not_cached" in {event.kind for event in report.events}


def test_without_a_cache_a_stopped_run_goes_on_too(
    smallest: Path, text_file: Path, tmp_path: Path, measured: list[int]
) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(InterruptedRun):
        execute(wanted(smallest, tmp_path / "out", text_file), progress=Stopping(step="compress", note="block 0"))
    report = execute(wanted(smallest, tmp_path / "out", text_file))
    assert measured == [0, 1] and "not_cached" in {event.kind for event in report.events}
    assert not [path for path in (tmp_path / "out").iterdir() if "sensitivity" in path.name]


def test_what_fits_as_a_whole_is_not_measured(
    smallest: Path, text_file: Path, tmp_path: Path, measured: list[int]
) -> None:
    report = execute(wanted(smallest, tmp_path / "out", text_file, allocate={"bpw": 31.0}))
    stage = done(report)
    assert not measured and stage.allocation is not None and stage.allocation.predicted is None
    assert {layer.bits for layer in stage.layers} == {8}
    assert "target_above" in {event.kind for event in report.events}


def test_a_step_that_is_too_coarse_is_told(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"ignore": [".*layers.1.*", ".*self_attn.*", ".*(gate|up)_proj"]}
    report = execute(
        wanted(
            smallest,
            tmp_path / "out",
            text_file,
            allocate={"bpw": 30.36, "candidates": [CANDIDATES[0], CANDIDATES[2]]},
            stage=stage,
        )
    )
    told = [event.message for event in report.events if event.kind == "target_below"]
    assert len(told) == 1 and "1.4% less" in told[0]


def test_gguf(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    types = [{"type": "Q4_0"}, {"type": "Q5_0"}, {"type": "Q8_0"}]
    stage = {"format": {"name": "gguf"}}
    made = wanted(
        models_folder("llama"), tmp_path / "out", text_file, allocate={"candidates": types, "bpw": 7}, stage=stage
    )
    found = done(execute(made))
    assert found.type is None and found.allocation is not None
    assert len({layer.type for layer in found.layers}) > 1
    assert found.bits_per_weight <= 7 and len(found.allocation.units) == 16
    saved = load(str(tmp_path / "out" / "recipe.yaml"))
    execute(saved.model_copy(update={"output": str(tmp_path / "again")}))
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_blocks_are_learned_with_what_was_chosen(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"reconstruct": {"steps": 10, "tokens": 32}}
    found = done(execute(wanted(smallest, tmp_path / "out", text_file, stage=stage)))
    assert found.allocation is not None and [block.block for block in found.blocks] == [0, 1]


def test_a_gate_on_the_size_is_asked_at_once(
    smallest: Path, text_file: Path, tmp_path: Path, measured: list[int]
) -> None:
    made = wanted(smallest, tmp_path / "out", text_file, stage={"gate": {"max_size": 30_000}})
    with pytest.raises(GateError, match="Nothing was computed"):
        execute(made)
    assert not measured


def test_too_little_memory_to_measure_is_refused(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    big = wanted(smallest, tmp_path / "out", text_file, allocate={"rows": 4096}, calibration={"samples": 4096})
    plan, small = run.make_plan(big), run.make_plan(wanted(smallest, tmp_path / "out", text_file))
    assert plan.memory_bytes > small.memory_bytes
    with pytest.raises(ResourceError, match="memory"):
        execute(big.model_copy(update={"run": big.run.model_copy(update={"memory": 321 << 20})}))


def test_smoke(smallest: Path, text_file: Path, tmp_path: Path, cache: Path) -> None:
    assert all(check.passed for check in run.smoke(wanted(smallest, tmp_path / "out", text_file), progress=Silent()))
    assert not cache.exists() and not (tmp_path / "out").exists()


def test_measure(
    smallest: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: list[int]
) -> None:
    arguments = ["--calibration", str(text_file), "--samples", "4", "--length", "16", "--threads", "1"]
    more = ["--set", f"allocate.candidates={json.dumps(CANDIDATES)}", "--set", "allocate.rows=2"]
    saved = tmp_path / "found.json"
    assert main(["measure", str(smallest), *arguments, *more, "--save", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "W2 g32" in shown and "model.layers.0.mlp.gate_proj, up_proj" in shown
    assert (tmp_path / "found.json.svg").read_text().startswith("<svg")
    assert main(["measure", str(smallest), *arguments, *more, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"] == CANDIDATES and len(found["units"]) == 8
    assert json.loads(saved.read_text())["units"] == found["units"]
    assert measured == [0, 1]
    assert main(["measure", str(smallest), *arguments, "--save", str(tmp_path / "nowhere" / "found.json")]) == 7
    assert main(["quantize", str(smallest), *arguments, "--target-bpw", "3", "--plan"]) == 3
    assert "No choice of candidates has" in capsys.readouterr().err


def test_a_run_that_goes_on_keeps_to_what_it_chose(
    smallest: Path, text_file: Path, tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache may be gone, and what would be measured now may be something else."""
    execute(wanted(smallest, tmp_path / "whole", text_file))
    with pytest.raises(InterruptedRun):
        execute(wanted(smallest, tmp_path / "out", text_file), progress=Stopping(step="compress", note="block 0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other cache"))
    measured.clear()
    execute(wanted(smallest, tmp_path / "out", text_file))
    assert not measured and content(tmp_path / "out") == content(tmp_path / "whole")


def test_costs_that_are_known_load_no_block(smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    execute(wanted(smallest, tmp_path / "out", text_file))
    monkeypatch.setattr(Sensitivity, "_begin", None)
    execute(wanted(smallest, tmp_path / "other", text_file, allocate={"bpw": 16.5}))


def test_what_follows_the_method_changes_no_cost(
    smallest: Path, text_file: Path, tmp_path: Path, measured: list[int]
) -> None:
    execute(wanted(smallest, tmp_path / "out", text_file))
    stage = {"transform": ["hadamard"], "reconstruct": {"steps": 2}, "tune": {"steps": 2}}
    report = execute(wanted(smallest, tmp_path / "other", text_file, stage=stage))
    assert measured == [0, 1]
    (event,) = [event for event in report.events if event.kind == "measured_before"]
    assert event.message == "costs were measured before hadamard (states and values)"


def test_a_cache_that_fills_up_is_left(smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from llmshrink.sensitivity import kept

    def full(path: Path, data: bytes) -> None:
        if path.parent.name == "llmshrink":
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    write = kept.write_bytes
    monkeypatch.setattr(kept, "write_bytes", full)
    report = execute(wanted(smallest, tmp_path / "out", text_file))
    assert "not_cached" in {event.kind for event in report.events}
