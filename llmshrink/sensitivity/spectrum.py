"""Which rank each matrix gets, found from its singular values: `spectrum`.

What a product of rank r loses of a matrix is the tail of its squared singular values, as the method weighs it. As a
share of all of them it can be compared from layer to layer, and the sum of these shares, each times the numbers of its
matrix, is made least for as many numbers as are to be kept. A product never has as many numbers as its matrix, and a
matrix that would need nearly all of them stays as it is: so the narrow keys and values of grouped-query attention,
which one share for all layers ruins (SVD-LLM's issues 20 and 27), keep what they need. Inputs are the original model's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmshrink.allocate.solver import Option, solve
from llmshrink.engine.gather import gather
from llmshrink.engine.groups import starved
from llmshrink.engine.hidden import Hidden
from llmshrink.errors import InputError, PlanError
from llmshrink.memory import trim
from llmshrink.methods import by_weights
from llmshrink.methods.lowrank import LowRankConfig, LowRankMethod, spectrum
from llmshrink.model.anatomy import Block, Group, Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.economy import Economy, passes
from llmshrink.plan.ratios import Ratios
from llmshrink.progress import Progress
from llmshrink.statistics import NoStatistic, Statistic

RANKS = 64  # that are compared for each matrix


def by_spectrum(
    ratios: Ratios, model: StreamedModel, hidden: Hidden | None, economy: Economy, progress: Progress
) -> list[float]:
    """The share of its numbers that each unit saves.

    Args:
        ratios: what is open.
        model: the original.
        hidden: what enters its first block; None where the method looks at no text.
        economy: how much is in memory at a time.
        progress: told of the steps.
    """
    if not ratios.units:
        return []
    blocks = model.anatomy.blocks
    unit_of = {matrix.key: number for number, unit in enumerate(ratios.units) for matrix in unit.matrices}
    lost: list[Tensor | None] = [None] * len(ratios.units)
    progress.start("find the rank of each matrix", len(blocks))
    for block in blocks:
        model.load_block(block.index)
        for matrix, tails in _tails(block, ratios, model, hidden, economy):
            number = unit_of[matrix.key]
            own = tails * matrix.numel
            before = lost[number]
            lost[number] = own if before is None else before + own
        if hidden is not None:
            hidden.advance(block.index)
        model.drop_block(block.index)
        trim()
        progress.advance(1, f"block {block.index}")
    progress.finish()
    assert isinstance(ratios.config, LowRankConfig)
    shapes = [unit.matrices[0].shape for unit in ratios.units]
    counts = [len(unit.matrices) for unit in ratios.units]
    ranks = best_ranks(ratios.config, shapes, counts, [found for found in lost if found is not None])
    return [
        0.0 if rank is None else 1 - ratios.config.numbers(shape, rank) / (shape[0] * shape[1])
        for rank, shape in zip(ranks, shapes, strict=True)
    ]


def _tails(
    block: Block, ratios: Ratios, model: StreamedModel, hidden: Hidden | None, economy: Economy
) -> Iterator[tuple[Matrix, Tensor]]:
    """Each open matrix of a loaded block, with the share of it that every rank loses."""
    work = ratios.work
    open_ = {m.key for unit in ratios.units for m in unit.matrices}
    groups = [group for group in block.groups if any(m.key in open_ for m in group.matrices)]
    methods = {m.key: method for m, method in work.methods.items()}
    needs: dict[Group, tuple[type[Statistic], ...]] = {
        group: (NoStatistic, methods[next(m.key for m in group.matrices if m.key in open_)].statistic)
        for group in groups
    }
    sizes = [sum(kind.bytes(group.width) for kind in needs[group]) for group in groups]
    for part in passes(sizes, economy.statistics):
        wanted = groups[part]
        gathered = gather(model, block, wanted, {group: needs[group] for group in wanted}, hidden) if hidden else {}
        for group in wanted:
            for matrix in (m for m in group.matrices if m.key in open_):
                method = methods[matrix.key]
                if group in gathered and starved(matrix, gathered[group][NoStatistic].tokens):
                    method = by_weights(method)  # as it will be compressed
                assert isinstance(method, LowRankMethod)
                kind = method.statistic
                seen = gathered[group][kind] if group in gathered else kind(group.width, model.device)
                found = spectrum(model.read(matrix).double(), method.metric(method.prepare(seen)))
                if not found.isfinite().all():
                    raise InputError(
                        f"{matrix.name}: its singular values are infinite or undefined.",
                        hint="Leave the layer out with `ignore`, or calibrate on other text.",
                    )
                yield matrix, tails_of(found)


def tails_of(found: Tensor) -> Tensor:
    """The share of the sum that is left behind the first r numbers, for each r from 0: float64 [n + 1]."""
    behind = torch.cat([found.flip(0).cumsum(0).flip(0), found.new_zeros(1)])
    return behind / behind[0] if float(behind[0]) > 0 else behind


def best_ranks(
    config: LowRankConfig, shapes: list[tuple[int, int]], counts: list[int], tails: list[Tensor]
) -> list[int | None]:
    """The rank of each unit for which they lose least together; None: it stays as it is.

    Args:
        config: the share of all numbers that is kept.
        shapes: of a matrix of each unit.
        counts: how many matrices it has.
        tails: what each rank from 0 loses of them, float64 [min(out, in) + 1].

    Raises:
        PlanError: not even rank 1 everywhere keeps within the share.
    """
    ranks: list[list[int | None]] = []
    options: list[list[Option]] = []
    for shape, count, lost in zip(shapes, counts, tails, strict=True):
        most = config.most(shape)
        tried = sorted({max(1, round(most * step / RANKS)) for step in range(1, RANKS + 1)}) if most else []
        products = [Option(count * config.numbers(shape, rank), float(lost[rank])) for rank in tried]
        # Beside codes a matrix of floats would have more bytes than its numbers say.
        whole = [Option(count * shape[0] * shape[1], 0.0)] if config.coded is None else []
        ranks.append([*tried, *([None] if whole else [])])
        options.append([*products, *whole])
    total = sum(count * shape[0] * shape[1] for shape, count in zip(shapes, counts, strict=True))
    found = solve(options, int(config.kept * total))
    if found is None:
        raise PlanError(f"keep {config.kept:g}: rank 1 everywhere has more numbers.", hint="Keep more.")
    return [of[i] for of, i in zip(ranks, found, strict=True)]
