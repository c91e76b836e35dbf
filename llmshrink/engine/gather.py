"""Statistics of the inputs of a block's linears, from one pass of all calibration rows through the block."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from itertools import zip_longest

import torch
from torch import Tensor

from llmshrink.engine.hidden import Hidden
from llmshrink.engine.lanes import Turns, side_by_side
from llmshrink.errors import LlmshrinkError
from llmshrink.memory import trim
from llmshrink.model.anatomy import Block, Group, Site, watch
from llmshrink.model.streamed import StreamedModel
from llmshrink.statistics import Cross, Fisher, Gathered, Hessian, Statistic

# Of the mean square of the head's inputs: what 0.1 to 1 of it give differs little with 4 bits and more, and with fewer
# they differ from text to text (LOG).
LOOKED_UP = 0.3


class _Enough(Exception):  # noqa: N818 - the last wanted input was seen: what follows in the block is not needed
    pass


class _Batch(threading.local):
    """What the thread knows of the batch that it runs."""

    def __init__(self) -> None:
        self.number = 0
        self.seen: dict[Group, Tensor] = {}
        self.first = False  # whether the states are the original's, which go first
        self.originals: dict[Group, Tensor] = {}


def gather(
    model: StreamedModel,
    block: Block,
    groups: list[Group],
    kinds: dict[Group, tuple[type[Statistic], ...]],
    hidden: Hidden,
    slopes: Mapping[Group, Tensor] | None = None,
) -> dict[Group, Gathered]:
    """Run all batches through the loaded block and gather the statistics of each group, before inputs are rounded.

    Linears that the plan found to share an input must be handed the very same tensor here too; anything else would mean
    that one is compressed for the inputs of another, and is an error. Of groups in `slopes` [tokens of all rows] a
    `Fisher` weighs tokens by these.
    """
    statistics: dict[Group, Gathered] = {
        group: {kind: kind(group.width, model.device) for kind in kinds[group]} for group in groups
    }
    owner = {site: group for group in groups for site in group.sites}
    last = groups[-1].sites[-1] if groups[-1].sites[-1].expert is None else None
    crossed = {group for group in groups if any(issubclass(kind, Cross) for kind in kinds[group])}
    paired = crossed if hidden.originals else set()  # without them these are the original's
    batch, turns = _Batch(), Turns(len(hidden.batches))
    sizes = [tokens.numel() for tokens in hidden.batches]
    weights = {group: torch.split(each, sizes) for group, each in (slopes or {}).items()}

    def observe(site: Site, x: Tensor) -> None:
        group, seen = owner.get(site), batch.seen
        if group is None:
            return
        if group not in seen:
            seen[group] = x
            rows = x.reshape(-1, x.shape[-1])
            if batch.first:
                if group in paired:
                    batch.originals[group] = rows.to(torch.float32, copy=True)
            else:
                with turns.turn(batch.number, group):
                    weight = weights[group][batch.number] if group in weights else None
                    _update(statistics[group], rows.float(), batch.originals.pop(group, None), weight)
        elif seen[group].data_ptr() != x.data_ptr() or seen[group]._version != x._version:
            raise LlmshrinkError(f"{site.module}: its input is not the tensor that {group.sites[0].module} gets.")
        if site == group.sites[-1]:
            del seen[group]  # activations of wide layers are large: none is held longer than needed
        if site == last:
            raise _Enough

    def run(number: int) -> None:
        batch.number = number
        with turns.taking_part(number):
            for batch.first in (True, False) if paired else (False,):
                batch.seen = {}
                with suppress(_Enough):
                    hidden.run(block.index, number, original=batch.first)

    with watch(model.model.get_submodule(block.prefix), block.prefix, observe):
        for _ in side_by_side(model.device, run, len(hidden.batches)):
            pass
    for statistic in (s for gathered in statistics.values() for s in gathered.values()):
        statistic.finish()
    return statistics


def _update(statistics: Gathered, x: Tensor, original: Tensor | None, weight: Tensor | None = None) -> None:
    """Add a batch of inputs [tokens, in], of the original's where they are known, and what each token counts."""
    for statistic in statistics.values():
        if isinstance(statistic, Fisher) and weight is not None:
            statistic.update(x * weight.to(x.device).sqrt().view(-1, 1))
            continue
        if isinstance(statistic, Cross) and original is not None:
            statistic.pair(x, original)
        else:
            statistic.update(x)


def gather_tied(model: StreamedModel, group: Group, kinds: tuple[type[Statistic], ...], hidden: Hidden) -> Gathered:
    """The statistics of an embedding that is the head too, from states that have just been embedded.

    It must be known before any block is compressed, so they take a way of their own through the original. What is
    looked up meets no input: there all errors of a row count alike, which is `LOOKED_UP` of them beside the head's.
    """
    for block in model.anatomy.blocks:
        model.load_block(block.index)
        hidden.advance(block.index)
        model.drop_block(block.index)
        trim()
    gathered = gather_head(model, group, kinds, hidden)
    for statistic in gathered.values():
        if isinstance(statistic, Hessian):
            diagonal = statistic.matrix.diagonal()
            diagonal += LOOKED_UP * diagonal.mean()
    return gathered


def gather_head(model: StreamedModel, group: Group, kinds: tuple[type[Statistic], ...], hidden: Hidden) -> Gathered:
    """The statistics of the head's input over all batches, whose states have left the last block."""
    gathered: Gathered = {kind: kind(group.width, model.device) for kind in kinds}

    def rows(tokens: Tensor, state: Tensor) -> Tensor:
        return model.head_input(tokens, state).reshape(-1, group.width).float()

    originals = hidden.originals if any(issubclass(kind, Cross) for kind in kinds) else []
    for tokens, state, original in zip_longest(hidden.batches, hidden.states[: len(hidden.batches)], originals):
        _update(gathered, rows(tokens, state), None if original is None else rows(tokens, original))
    for statistic in gathered.values():
        statistic.finish()
    return gathered
