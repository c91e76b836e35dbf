"""Tuning from end to end: gradients reach every scale and vector, and what is learned is what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import recipe
from torch import Tensor

from llmshrink import run
from llmshrink.engine.backward import backward
from llmshrink.engine.budget import compress_scratch, planned_memory
from llmshrink.engine.groups import GroupCompressor
from llmshrink.engine.hidden import Hidden
from llmshrink.engine.moves import Moved, Moves
from llmshrink.engine.shards import Shards
from llmshrink.engine.tune import HELD, Targets, Tuner
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.work import Work
from llmshrink.planning import plan_of
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("without_reader")
STEP = 1e-3
FORMATS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"bits": 2},
    "gptq": {"bits": 4, "symmetric": False},
    "awq": {"bits": 4, "symmetric": False},
}


def wanted(model: Path, out: Path, text: Path, stored_as: str = "compressed-tensors") -> Recipe:
    method = {"name": "rtn", "group_size": 32, **FORMATS[stored_as]}
    return recipe(model, out, text, method, stage={"format": {"name": stored_as}, "tune": {}})


def finished(model: Path, out: Path, text: Path, stored_as: str = "compressed-tensors") -> tuple[Work, Shards]:
    """What a run has when all parts are compressed."""
    wish = wanted(model, out, text, stored_as)
    plain = wish.model_copy(update={"stages": [wish.stages[0].model_copy(update={"tune": None})]})
    run.execute(plain, progress=Silent())
    work, *_ = plan_of(wish, StreamedModel(open_source(str(model)), torch.device("cpu")))
    return work, Shards(work, GroupCompressor(work), out)


def targets(work: Work, count: int = 10) -> Targets:
    tokens = torch.randint(3, 100, (2 * count, 12), generator=torch.Generator().manual_seed(5))
    hidden = Hidden(work.model, list(tokens.split(2)), originals=True)
    for block in work.model.anatomy.blocks:
        work.model.load_block(block.index)
        hidden.advance_originals(block.index)
        work.model.drop_block(block.index)
    return Targets(work.model, hidden.batches, hidden.originals, logits=7 * 2 * work.model.width * 4)


def noise(moves: Moves, size: float) -> None:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for move in moves.all.values():
            move += size * torch.randn(move.shape, generator=generator)


@pytest.mark.parametrize("stored_as", FORMATS)
def test_what_is_learned_is_what_is_written(
    models_folder: Any, text_file: Path, tmp_path: Path, stored_as: str
) -> None:
    """Wherever it moves: codes and zero points stay, and the blocks that are loaded are those of the files."""
    model = models_folder("llama", torch.float16 if stored_as in ("gptq", "awq") else torch.bfloat16)
    work, shards = finished(model, tmp_path / "out", text_file, stored_as)
    moves = Moves.none(work)
    moved = Moved(work, shards, moves)
    assert not any(moved.changed(part) for part in work.parts)
    noise(moves, 0.02)
    changed = {name: tensor for part in work.parts for name, tensor in moved.changed(part).items()}
    assert any("scale" in name for name in changed) and any("norm" in name for name in changed)
    assert not any(name.endswith(("packed", "qweight", "qzeros", "zero_point", "g_idx")) for name in changed)
    for block in work.model.anatomy.blocks:
        loaded = {key: leaf.detach() for key, leaf in moved.load(block.index).items()}
        shards.replaced = changed
        written = shards.written(block)
        assert {m.key for m in block.matrices} < loaded.keys() <= written.keys()
        assert all(torch.equal(loaded[key], written[key].weight().float()) for key in loaded)
        shards.replaced = {}
        moved.drop(block.index)


def test_gradients_are_those_of_the_divergence(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    """By differences of the whole model's KL; in float32 nothing is rounded on the way."""
    work, shards = finished(smallest, tmp_path / "out", text_file)
    rows, moves = targets(work, 2), Moves.none(work)
    moved = Moved(work, shards, moves)
    noise(moves, 0.01)

    def divergence(*, learn: bool) -> float:
        def head(batch: int, state: Tensor) -> tuple[float, Tensor]:
            return rows.divergence(batch, state, moved, learn=learn)

        return backward(Hidden(work.model, rows.batches), moved, head)

    divergence(learn=True)
    found = {key: move.grad for key, move in moves.all.items()}
    assert all(gradient is not None and bool(gradient.any()) for gradient in found.values())
    for key, move in moves.all.items():
        gradient, pair = found[key], []
        assert gradient is not None
        for sign in (1, -1):
            change = sign * STEP * gradient / gradient.norm()
            with torch.no_grad():
                move += change
            pair.append(divergence(learn=False))
            with torch.no_grad():
                move -= change
        assert (pair[0] - pair[1]) / (2 * STEP) == pytest.approx(float(gradient.norm()), rel=0.03), key


def test_rows_are_held_back_and_the_others_take_turns(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    work, shards = finished(smallest, tmp_path / "out", text_file)
    rows = targets(work, 10)
    assert rows.held == [0, HELD] and sorted(rows.held + rows.rest) == list(range(10))
    seen = [number for step in range(8) for number in rows.chosen(step, 48, seed=0)]
    assert sorted(seen[:8]) == sorted(seen[8:]) == rows.rest and seen[:8] != seen[8:]
    one = targets(work, 1)
    assert one.held == one.rest == [0]
    work.tune = work.tune and work.tune.model_copy(update={"steps": 3, "rate": 0.01})
    tuner = Tuner(work, shards, rows, None, seed=0)
    losses = list(tuner.run())
    assert len(losses) == 3 and tuner.point.before is not None and tuner.score() < tuner.point.before


def test_the_plan_counts_it(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    wish = wanted(smallest, tmp_path / "out", text_file)
    work, *_ = plan_of(wish, StreamedModel(open_source(str(smallest)), torch.device("cpu")))
    rows = wish.calibration.samples
    # Groups of 32 in q and o [32, 32], k and v [16, 32], gate and up [64, 32], down [32, 64]; five norms.
    assert work.tuned_numbers == 2 * (2 * 32 + 2 * 16 + 2 * 64 + 2 * 32) + 5 * 32
    assert compress_scratch(work, wish) > sum(work.shard_bytes.values())
    with_it = planned_memory(work, work.economy, rows=rows, subset=False)
    work.tune = None
    assert with_it > planned_memory(work, work.economy, rows=rows, subset=False)
