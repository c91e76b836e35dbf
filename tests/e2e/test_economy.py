"""A run that is short of memory: what it does about it changes no byte, or is told; and it never loses what is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, SMALL_METHOD, content, recipe
from tiny import build_model, config
from torch import Tensor

from llmshrink import run
from llmshrink.engine import budget, compress, groups
from llmshrink.engine.gather import gather
from llmshrink.engine.hidden import Hidden
from llmshrink.errors import ResourceError
from llmshrink.evaluate import measure
from llmshrink.evaluate.texts import score_texts
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan import economy
from llmshrink.plan.economy import Economy
from llmshrink.progress import Silent
from llmshrink.recipe.schema import ModelSpec, Recipe
from llmshrink.report.schema import Report

pytestmark = pytest.mark.usefixtures("without_reader")
PLACES = {"gather": compress, "compressed": groups}
FULL = torch.OutOfMemoryError("CUDA out of memory")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


@pytest.fixture
def small(smallest: Path, text_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes of a run that takes a second."""

    def make(**more: Any) -> Recipe:
        sections = {name: {**SMALL.get(name, {}), **more.get(name, {})} for name in {*SMALL, *more}}
        return recipe(smallest, tmp_path / "out", text_file, SMALL_METHOD, **sections)

    return make


@pytest.fixture
def deep(small: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    """A recipe for three blocks and one batch of five rows, which no halves divide evenly."""
    build_model(tmp_path / "deep", config("llama", num_hidden_layers=3, hidden_size=32, intermediate_size=64))
    return small(calibration={"samples": 5}, run={"batch_tokens": 80}).model_copy(
        update={"model": ModelSpec(id=str(tmp_path / "deep"))}
    )


def result(wanted: Recipe) -> tuple[dict[str, str], Report]:
    """What a run gives; its output is removed."""
    report = run.execute(wanted, progress=Silent())
    assert wanted.output is not None
    found = content(Path(wanted.output))
    shutil.rmtree(wanted.output)
    return found, report


def kinds(report: Report) -> list[str]:
    return [event.kind for event in report.events]


class Failing:
    """A function that fails while `fails` says so of its arguments; `calls` counts."""

    def __init__(self, function: Callable[..., Any], fails: Callable[..., bool], error: Exception = FULL) -> None:
        self._function, self._fails, self._error, self.calls = function, fails, error, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self._fails(self.calls, *args):
            raise self._error
        return self._function(*args, **kwargs)


def too_large(_: int, *args: Any) -> bool:
    return any(isinstance(a, Hidden) and a.most_tokens() > 40 for a in args)


# --- known beforehand


def test_states_on_disk_and_several_passes_change_no_byte(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = result(small())
    counted = Failing(gather, lambda *_: False)
    states: list[Path | None] = []
    begin = Hidden.__init__

    def noted(self: Hidden, model: StreamedModel, batches: list[Tensor], *more: Any, **named: Any) -> None:
        states.append(more[1] if len(more) > 1 else named.get("folder"))
        begin(self, model, batches, *more, **named)

    monkeypatch.setattr(Hidden, "__init__", noted)
    monkeypatch.setattr(compress, "gather", counted)
    monkeypatch.setattr(budget, "memory_there", lambda _: 0)
    monkeypatch.setattr(economy, "LEAST_STATISTICS", 1 << 10)
    found, report = result(small())
    assert found == expected
    assert counted.calls == 8  # four groups of two blocks, one by one
    assert states[0] is not None
    assert kinds(report) == ["economy"]


def test_a_budget_is_kept_by_smaller_batches_too(small: Callable[..., Recipe]) -> None:
    plan = run.make_plan(small(run={"memory": 1, "batch_tokens": 10**6}, calibration={"samples": 12}))
    assert "16 tokens in a forward pass" in next(e.message for e in plan.events if e.kind == "economy")
    with pytest.raises(ResourceError, match=r"0 are within --memory.*\n.*give --memory \d+MiB") as caught:
        run.execute(small(run={"memory": 1}), progress=Silent())
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("save_every", [0, 60])
def test_a_run_may_go_on_within_less_memory(
    deep: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: float
) -> None:
    """The way out for a run that the system killed for its memory: what is finished stays, and is run again as it was.

    With hidden states saved after each block, or none.
    """
    monkeypatch.setattr(compress, "SAVE_EVERY", save_every)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "gather", Failing(gather, lambda n, *_: n > 2))
        with pytest.raises(ResourceError, match=r"same command again with --memory") as caught:
            run.execute(deep, progress=Silent())
        assert caught.value.exit_code == 6 and not (tmp_path / "out").exists()
    shards = [tmp_path / "out.partial" / f"model-0000{n}-of-00004.safetensors" for n in (1, 2)]
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in shards]
    seen: list[list[int]] = []
    advance = Hidden.advance

    def noted(self: Hidden, *args: Any) -> float:
        seen.append(self.rows)
        return advance(self, *args)

    monkeypatch.setattr(Hidden, "advance", noted)
    smaller = deep.run.model_copy(update={"batch_tokens": 16})
    report = run.execute(deep.model_copy(update={"run": smaller}), progress=Silent())
    written = [tmp_path / "out" / path.name for path in shards]
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in written] == before
    assert report.stages[0].resumed_blocks == 2
    assert kinds(report) == ["smaller_batches"]
    assert "after 2 blocks with 16 tokens" in report.events[0].message
    if save_every:
        assert seen[:2] == [[5], [5]]  # run again as they were done


# --- found out on the way


@pytest.mark.parametrize("error", [FULL, HOST, MemoryError()])
@pytest.mark.parametrize("where", PLACES)
def test_memory_that_ran_out_once_changes_no_byte(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    expected, report = result(small())
    assert kinds(report) == []
    monkeypatch.setattr(PLACES[where], where, Failing(getattr(PLACES[where], where), lambda n, *_: n == 2, error))
    found, report = result(small())
    assert found == expected and kinds(report) == ["out_of_memory"]


@pytest.mark.parametrize("save_every", [0, 60])
@pytest.mark.parametrize("block", [0, 1])
def test_batches_get_smaller_where_memory_runs_out_again(
    deep: Recipe, monkeypatch: pytest.MonkeyPatch, block: int, save_every: float
) -> None:
    """And a run that is killed later goes on with them: the journal says how large they were for each block."""
    monkeypatch.setattr(compress, "SAVE_EVERY", save_every)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "gather", Failing(gather, lambda n, *a: n > block and too_large(n, *a)))
        found, report = result(deep)
        assert kinds(report) == ["out_of_memory", "smaller_batches"]
        assert "going on with 40 tokens in a forward pass" in report.events[1].message
        patch.setattr(compress, "gather", Failing(gather, lambda n, *a: n > block and (too_large(n, *a) or n > 4)))
        with pytest.raises(ResourceError):
            run.execute(deep, progress=Silent())
    seen = Failing(gather, too_large)
    monkeypatch.setattr(compress, "gather", seen)
    again, report = result(deep)
    assert report.stages[0].resumed_blocks == 2 and kinds(report) == ["out_of_memory", "smaller_batches"]
    assert again == found and seen.calls == 1


def test_memory_that_always_runs_out_ends_the_run(
    small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = result(small())
    for where, module in PLACES.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, where, Failing(gather, lambda *_: True))
            with pytest.raises(ResourceError, match="Memory ran out: CUDA out of memory") as caught:
                run.execute(small(), progress=Silent())
        assert caught.value.exit_code == 6 and not (tmp_path / "out").exists()
        assert result(small())[0] == expected


@pytest.mark.parametrize("always", [False, True])
def test_a_result_whose_score_does_not_fit_is_kept(
    small: Callable[..., Recipe], text_file: Path, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    def scored(*args: Any, economy: Economy, **more: Any) -> Any:
        if always or economy.batch_tokens > 16:
            raise FULL
        return score_texts(*args, economy=economy, **more)

    monkeypatch.setattr(measure, "score_texts", scored)
    _, report = result(small(evaluation={"data": [str(text_file)], "rows": 4, "length": 16}))
    assert "out_of_memory" in kinds(report)
    assert ("not_measured" in kinds(report)) == always
    assert report.after is not None and bool(report.after.scores) != always
