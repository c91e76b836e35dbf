"""Which matrices become one, found by how much is lost if they do: `similarity`.

Each set of matrices of one name in adjacent blocks is tied or not. What the nearest common matrix loses of each, as a
share of its outputs, times its numbers, is added up; the sets are tied that lose least together for as many numbers as
are to be saved. Inputs are the original model's.
"""

from __future__ import annotations

from llmshrink.engine.bases import together
from llmshrink.engine.hidden import Hidden
from llmshrink.forms import Event
from llmshrink.methods.tie import lost
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.economy import Economy
from llmshrink.plan.ratios import Ratios
from llmshrink.progress import Progress
from llmshrink.sensitivity.spectrum import Shares


def by_similarity(
    ratios: Ratios, model: StreamedModel, hidden: Hidden | None, economy: Economy, progress: Progress
) -> Shares:
    """The share of its numbers that each unit saves.

    Args:
        ratios: what is open.
        model: the original.
        hidden: what enters its first block.
        economy: how much is in memory at a time.
        progress: told of each block.

    Raises:
        PlanError: with all of them tied there are more numbers than are to be kept.
    """
    shares: dict[str, float] = {}  # of a set, by the key of its first matrix: mean loss of its matrices
    methods = {m.key: method for m, method in ratios.work.methods.items()}
    progress.start("find what is alike", len(model.anatomy.blocks))
    for stack, seen in together(model, methods, ratios.sets, hidden, economy, progress):
        found = lost([model.read(matrix).double() for matrix in stack], seen)
        shares[stack[0].key] = sum(found) / len(found)
    progress.finish()
    means = [shares[stack[0].key] for stack in ratios.sets]
    saved = ratios.tied([m * len(s) * s[0].numel for m, s in zip(means, ratios.sets, strict=True)])
    gone = {m.key for unit, share in zip(ratios.units, saved, strict=True) if share for m in unit.matrices}
    tied = [mean for mean, stack in zip(means, ratios.sets, strict=True) if stack[0].key in gone]
    message = f"{len(tied)} of {len(means)} sets of matrices become one each"
    data = {"sets": float(len(means)), "tied": float(len(tied))}
    if tied:
        message += f", and lose {min(tied):.0%} to {max(tied):.0%} of what their outputs say"
        data["lost"] = sum(tied) / len(tied)
    return Shares(saved, frozenset(), [Event("tied", message, data=data)])
