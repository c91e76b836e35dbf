"""Which rank each matrix gets, found from its singular values: `spectrum`.

What a product of rank r loses of a matrix is the tail of its squared singular values, as the method weighs it. As a
share of all of them it can be compared from layer to layer, and the sum of these shares, each times the numbers of its
matrix, is made least for as many numbers as are to be kept. A product never has as many numbers as its matrix, and a
matrix that would need nearly all of them stays as it is: so the narrow keys and values of grouped-query attention,
which one share for all layers ruins (SVD-LLM's issues 20 and 27), keep what they need. Inputs are the original model's.

Where matrices of several blocks may share a factor, each set does so that loses less with it than without, for as many
numbers as its matrices get by themselves; then the ranks are found once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink.allocate.solver import Option, solve
from llmshrink.engine.bases import together
from llmshrink.engine.hidden import Hidden
from llmshrink.errors import InputError, PlanError
from llmshrink.forms import Event
from llmshrink.methods.basis import directions, left_behind
from llmshrink.methods.lowrank import LowRankConfig
from llmshrink.methods.metric import Metric, spectrum
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.economy import Economy
from llmshrink.plan.ratios import Ratios
from llmshrink.progress import Progress

RANKS = 64  # that are compared for each matrix


@dataclass
class Product:
    """What gets one rank: a matrix, experts that are alike, or matrices that share a factor.

    Attributes:
        units: Positions of the units that it is made of.
        shape: Of the matrix that is factored: [out, in].
        count: How many such there are.
        lost: What each rank from 0 loses of them, times their numbers: float64 [min(out, in) + 1].
    """

    units: tuple[int, ...]
    shape: tuple[int, int]
    count: int
    lost: Tensor


@dataclass(frozen=True)
class Shares:
    """What was found of each unit.

    Attributes:
        saved: The share of its numbers that goes.
        alone: Units that have all factors of their own, where they could share one.
        events: What to tell.
    """

    saved: list[float]
    alone: frozenset[int]
    events: list[Event]


def by_spectrum(
    ratios: Ratios, model: StreamedModel, hidden: Hidden | None, economy: Economy, progress: Progress
) -> Shares:
    """The share of its numbers that each unit saves.

    Args:
        ratios: what is open.
        model: the original.
        hidden: what enters its first block; None where the method looks at no text.
        economy: how much is in memory at a time.
        progress: told of the steps.
    """
    if not ratios.units:
        return Shares([], frozenset(), [])
    private, shared = _measured(ratios, model, hidden, economy, progress)
    assert isinstance(ratios.config, LowRankConfig)
    config = ratios.config
    products = private
    ranks = best_ranks(config, [p.shape for p in products], [p.count for p in products], [p.lost for p in products])
    better, events = worth_it(config, private, ranks, shared)
    if better:
        taken = {number for product in better for number in product.units}
        products = [*better, *(product for product in private if taken.isdisjoint(product.units))]
        ranks = best_ranks(config, [p.shape for p in products], [p.count for p in products], [p.lost for p in products])
    saved = [0.0] * len(ratios.units)
    for product, rank in zip(products, ranks, strict=True):
        for number in product.units:
            saved[number] = 0.0 if rank is None else 1 - config.numbers(product.shape, rank) / _numel(product)
    could = {number for product in shared for number in product.units}
    return Shares(saved, frozenset(could - {n for product in better for n in product.units}), events)


def _measured(
    ratios: Ratios, model: StreamedModel, hidden: Hidden | None, economy: Economy, progress: Progress
) -> tuple[list[Product], list[Product]]:
    """What every rank loses of each unit, and of each set of matrices that can share a factor."""
    unit_of = {matrix.key: number for number, unit in enumerate(ratios.units) for matrix in unit.matrices}
    methods = {m.key: method for m, method in ratios.work.methods.items() if m.key in unit_of}
    private = [Product((n,), u.matrices[0].shape, len(u.matrices), torch.zeros(0)) for n, u in enumerate(ratios.units)]
    shared: list[Product] = []
    sets = [*((matrix,) for unit in ratios.units for matrix in unit.matrices), *ratios.sets]
    progress.start("find the rank of each matrix", len(model.anatomy.blocks))
    for stack, seen in together(model, methods, sets, hidden, economy, progress):
        if len(stack) > 1:
            shared.append(_together(stack, tuple(unit_of[m.key] for m in stack), seen, model))
            continue
        ((matrix,), (metric,)) = stack, seen
        product, lost = private[unit_of[matrix.key]], _tails(matrix, metric, model) * matrix.numel
        product.lost = product.lost + lost if len(product.lost) else lost
    progress.finish()
    return private, shared


def _tails(matrix: Matrix, metric: Metric, model: StreamedModel) -> Tensor:
    """The share of a matrix that every rank loses."""
    found = spectrum(model.read(matrix).double(), metric)
    if not found.isfinite().all():
        raise InputError(
            f"{matrix.name}: its singular values are infinite or undefined.",
            hint="Leave the layer out with `ignore`, or calibrate on other text.",
        )
    return tails_of(found).cpu()


def _together(stack: tuple[Matrix, ...], units: tuple[int, ...], seen: list[Metric], model: StreamedModel) -> Product:
    """What every rank loses of matrices that share a factor."""
    weights = [model.read(matrix).double() for matrix in stack]
    rows = directions(weights, seen)
    (out, width), lost = stack[0].shape, torch.zeros(len(rows) + 1, dtype=torch.float64)
    for matrix, weight, metric in zip(stack, weights, seen, strict=True):
        lost += left_behind(weight, rows, metric).cpu() * matrix.numel
    return Product(units, (len(stack) * out, width), 1, lost)


def worth_it(
    config: LowRankConfig, private: list[Product], ranks: list[int | None], shared: list[Product]
) -> tuple[list[Product], list[Event]]:
    """The sets that lose less with a shared factor, for as many numbers; and what to tell of all of them."""
    better: list[Product] = []
    before = after = 0.0
    for product in shared:
        found = [(private[n], ranks[n]) for n in product.units]
        numbers = sum(_numel(one) if rank is None else config.numbers(one.shape, rank) for one, rank in found)
        lost = sum(0.0 if rank is None else float(one.lost[rank]) for one, rank in found)
        rank = min(config.within(product.shape, numbers / _numel(product)), config.most(product.shape))
        if rank > 0 and float(product.lost[rank]) < lost:
            better.append(product)
            before, after = before + lost, after + float(product.lost[rank])
    if not shared:
        return [], []
    if not better:
        message = f"none of {len(shared)} sets of matrices shares a factor: each loses less with factors of its own"
        return [], [Event("not_shared", message, data={"sets": float(len(shared)), "shared": 0.0})]
    less = f"and lose {1 - after / before:.0%} less than with their own"
    message = f"{len(better)} of {len(shared)} sets of matrices share a factor, {less}"
    data = {"sets": float(len(shared)), "shared": float(len(better)), "lost": after / before}
    return better, [Event("shared", message, data=data)]


def _numel(product: Product) -> int:
    return product.shape[0] * product.shape[1]


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
