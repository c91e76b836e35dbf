"""Statistics of the inputs of a block's linears, from one pass of all calibration rows through the block."""

from __future__ import annotations

import threading
from contextlib import suppress

from torch import Tensor

from llmshrink.engine.hidden import Hidden
from llmshrink.engine.lanes import Turns, side_by_side
from llmshrink.errors import LlmshrinkError
from llmshrink.model.anatomy import Block, Group, Site, watch
from llmshrink.model.streamed import StreamedModel
from llmshrink.statistics import Gathered, Statistic


class _Enough(Exception):  # noqa: N818 - the last wanted input was seen: what follows in the block is not needed
    pass


class _Batch(threading.local):
    """What the thread knows of the batch that it runs."""

    def __init__(self) -> None:
        self.number = 0
        self.seen: dict[Group, Tensor] = {}


def gather(
    model: StreamedModel,
    block: Block,
    groups: list[Group],
    kinds: dict[Group, tuple[type[Statistic], ...]],
    hidden: Hidden,
) -> dict[Group, Gathered]:
    """Run all batches through the loaded block and gather the statistics of each group, before inputs are rounded.

    Linears that the plan found to share an input must be handed the very same tensor here too; anything else would mean
    that one is compressed for the inputs of another, and is an error.
    """
    statistics: dict[Group, Gathered] = {
        group: {kind: kind(group.width, model.device) for kind in kinds[group]} for group in groups
    }
    owner = {site: group for group in groups for site in group.sites}
    last = groups[-1].sites[-1] if groups[-1].sites[-1].expert is None else None
    batch, turns = _Batch(), Turns(len(hidden.batches))

    def observe(site: Site, x: Tensor) -> None:
        group, seen = owner.get(site), batch.seen
        if group is None:
            return
        if group not in seen:
            seen[group] = x
            with turns.turn(batch.number, group):
                rows = x.reshape(-1, x.shape[-1]).float()
                for statistic in statistics[group].values():
                    statistic.update(rows)
        elif seen[group].data_ptr() != x.data_ptr() or seen[group]._version != x._version:
            raise LlmshrinkError(f"{site.module}: its input is not the tensor that {group.sites[0].module} gets.")
        if site == group.sites[-1]:
            del seen[group]  # activations of wide layers are large: none is held longer than needed
        if site == last:
            raise _Enough

    def run(number: int) -> None:
        batch.number, batch.seen = number, {}
        with turns.taking_part(number), suppress(_Enough):
            hidden.run(block.index, number)

    with watch(model.model.get_submodule(block.prefix), block.prefix, observe):
        for _ in side_by_side(model.device, run, len(hidden.batches)):
            pass
    for statistic in (s for gathered in statistics.values() for s in gathered.values()):
        statistic.finish()
    return statistics


def gather_head(model: StreamedModel, group: Group, kinds: tuple[type[Statistic], ...], hidden: Hidden) -> Gathered:
    """The statistics of the head's input over all batches, whose states have left the last block."""
    gathered: Gathered = {kind: kind(group.width, model.device) for kind in kinds}
    for tokens, state in zip(hidden.batches, hidden.states, strict=False):
        x = model.head_input(tokens, state)
        for statistic in gathered.values():
            statistic.update(x.reshape(-1, x.shape[-1]).float())
    for statistic in gathered.values():
        statistic.finish()
    return gathered
