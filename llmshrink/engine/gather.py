"""Statistics of the inputs of a block's linears, from one pass of all calibration rows through the block."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from llmshrink.engine.hidden import Hidden
from llmshrink.errors import LlmshrinkError
from llmshrink.model.anatomy import Block, Group, Site, watch
from llmshrink.model.streamed import StreamedModel
from llmshrink.statistics import Statistic


class _Enough(Exception):  # noqa: N818 - the last wanted input was seen: what follows in the block is not needed
    pass


@torch.no_grad()
def gather(
    model: StreamedModel,
    block: Block,
    groups: list[Group],
    kinds: dict[Group, type[Statistic]],
    hidden: Hidden,
    batches: int,
) -> dict[Group, Statistic]:
    """Run the first `batches` batches through the loaded block and gather one statistic for each group.

    Linears that the plan found to share an input must be handed the very same tensor here too; anything else would mean
    that one is compressed for the inputs of another, and is an error.
    """
    statistics = {group: kinds[group](group.width, model.device) for group in groups}
    owner = {site: group for group in groups for site in group.sites}
    last = groups[-1].sites[-1] if groups[-1].sites[-1].expert is None else None
    seen: dict[Group, Tensor] = {}

    def observe(site: Site, x: Tensor) -> None:
        group = owner.get(site)
        if group is None:
            return
        if group not in seen:
            seen[group] = x
            statistics[group].update(x.reshape(-1, x.shape[-1]).float())
        elif seen[group].data_ptr() != x.data_ptr() or seen[group]._version != x._version:
            raise LlmshrinkError(f"{site.module}: its input is not the tensor that {group.sites[0].module} gets.")
        if site == group.sites[-1]:
            del seen[group]  # activations of wide layers are large: none is held longer than needed
        if site == last:
            raise _Enough

    with watch(model.model.get_submodule(block.prefix), block.prefix, observe):
        for batch in range(batches):
            seen.clear()
            with suppress(_Enough):
                hidden.run(block.index, batch)
    for statistic in statistics.values():
        statistic.finish()
    return statistics
