"""GPTQ: round one input column at a time and let the columns still to come make up for the error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323. The objective is the squared error of the layer's outputs, tr((W - Q) H (W - Q)^T) with H the mean of
x x^T. Columns are taken in order of falling diag(H) ("activation order"), while groups stay those of adjacent columns.

The paper never returns to a code once it is chosen. Here `refine` does, by coordinate descent on the same objective:
each group's scale and then each code in turn moves to its best value given all the others.

With `propagate`, a layer does not aim at W x for the inputs x that the compressed blocks before it give, but towards
W y, what the original's layer gives for the inputs y of the original. The weights nearest to that by (damped) least
squares are W + W S (H + damp)^-1, with S the mean of (y - x) x^T, and GPTQ goes on from there. That is the target of
GPTAQ (Li et al. 2025, arXiv 2504.02692); going a part of the way only is taken from QEP (Arai and Ichikawa 2025,
arXiv 2504.09629).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Event, Layer, Objective
from llmshrink.methods.base import Method, Prepared, Task
from llmshrink.methods.grid import BlockConfig, Grid, choose_grid, round_to
from llmshrink.statistics import Cross, Hessian, Statistic

DOUBLE_WIDTH = 4096  # widest Hessian that is factorised in float64
PANEL = 256  # rows of the Hessian that are factorised at a time
LEAF = 16  # columns rounded one by one before what they change reaches the others
CONTIGUOUS = torch.contiguous_format
LADDER = (1.0, 10.0, 100.0, 1000.0)  # factors on the damping, tried in turn


class GptqConfig(BlockConfig):
    """Settings of GPTQ."""

    act_order: bool = Field(True, description="quantize the inputs with the largest mean square first")
    damp: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    refine: int = Field(1, ge=0, description="passes over all scales and codes after the paper's single one")
    propagate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="what share of the error of the compressed blocks before it a layer makes up for; above 0 the "
        "original's states are computed beside",
    )


@dataclass(frozen=True, kw_only=True)
class Factors(Prepared):
    """What the linears of a group share."""

    H: Tensor  # float32 [in, in], as gathered
    damp: float  # added to its diagonal
    importance: Tensor  # float32 [in], 1 / diag(H^-1): the cost of an error once all other inputs have made up for it
    order: Tensor  # int64 [in], the columns in the order they are rounded
    spread: Tensor  # float32 [in, in] in that order; row i spreads the error of column i. Below the diagonal: undefined
    shift: Tensor | None = None  # float32 [in, in], of each weight W the target is W + W shift


class Gptq(Method[GptqConfig]):
    """GPTQ with activation order, static groups, searched scales and refinement."""

    task: ClassVar[Task] = "quantize"
    needs = Hessian
    by_row = True
    baseline = "rtn"
    Config = GptqConfig

    @property
    def statistic(self) -> type[Statistic]:
        """The Hessian; with the original's inputs beside it where their difference is made up for."""
        return Cross if self.config.propagate else Hessian

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be compressed, or None."""
        return self.config.why_not(shape)

    def prepare(self, statistic: Statistic) -> Prepared:
        """Order the columns and factorise the Hessian once for all linears fed by the same tensor.

        Returns:
            Factors, or a plain Prepared with an event where only rounding to nearest is possible.
        """
        assert isinstance(statistic, Hessian)
        H = statistic.matrix
        if statistic.tokens == 0:
            return Prepared((Event("rtn_fallback", "rounded to nearest: no calibration token reached it"),))
        if not H.sum().isfinite():
            return Prepared((Event("rtn_fallback", "rounded to nearest: its Hessian is not finite"),))
        diagonal, events = H.diagonal(), []
        dead = int((diagonal <= 0).sum())
        if dead:
            message = f"{dead} of {len(H)} inputs were always zero: their weights are rounded to nearest"
            events.append(Event("dead_columns", message, data={"columns": float(dead)}))
        order = (
            diagonal.argsort(descending=True, stable=True)
            if self.config.act_order
            else torch.arange(len(H), device=H.device)
        )
        mean = float(diagonal.sum()) / max(len(H) - dead, 1) or 1.0
        for share in (self.config.damp * factor for factor in LADDER):
            factors = _factorise(H, order, share * mean)
            if factors is None:
                continue
            if share > self.config.damp:
                events.append(Event("damping", f"raised to {share:g} of the mean diagonal", data={"damp": share}))
            shift = self._shift(statistic, factors.damp) if isinstance(statistic, Cross) else None
            if isinstance(statistic, Cross) and shift is None:
                message = "it does not make up for the blocks before: its Hessian is too singular to solve with"
                events.append(Event("not_propagated", message))
            return replace(factors, shift=shift, events=tuple(events))
        failed = Event("rtn_fallback", "rounded to nearest: the Hessian could not be factorised at any damping")
        return Prepared((*events, failed))

    def _shift(self, statistic: Cross, damp: float) -> Tensor | None:
        """What the original's inputs move weights by; None where rounding makes the Hessian singular."""
        kind = torch.float64 if len(statistic.matrix) <= DOUBLE_WIDTH else torch.float32
        damped = statistic.matrix.to(kind, copy=True)
        damped.diagonal().add_(damp)
        factor, info = torch.linalg.cholesky_ex(damped)
        del damped
        if info.item():
            return None
        solved = torch.cholesky_solve(statistic.shift.T.to(kind), factor)  # (H^-1 S^T)^T = S H^-1
        return solved.T.float().mul_(self.config.propagate)

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Quantize one matrix [out, in].

        In each row, rounding to nearest on the grid that was found stands where nothing better came out.
        """
        W, kind = weight.float(), self.scales or weight.dtype
        if not isinstance(prepared, Factors):
            grid = choose_grid(W, self.config, kind)
            return Layer(grid.form(round_to(grid, W, self.config), self.config))
        if prepared.shift is not None:
            W = W + W @ prepared.shift
        first = choose_grid(W, self.config, kind, prepared.importance)
        grid, steps = first, self._sweep(W, first, prepared)
        for _ in range(self.config.refine):
            grid, steps = self._refine(W, grid, steps, prepared)
        return self._better_rows(W, (first, round_to(first, W, self.config)), (grid, steps), prepared.H)

    def _sweep(self, W: Tensor, grid: Grid, factors: Factors) -> Tensor:
        """Steps [out, in] by the paper's algorithm 1, on a transposed copy so that a column is contiguous."""
        order, spread = factors.order, factors.spread
        tables = [table.T.contiguous().unbind() for table in grid.tables(self.config)]
        groups = (order // self.config.group(len(order))).tolist()
        rest = W.T[order]  # once a column is rounded, the error it leaves
        result = torch.empty_like(rest)
        columns, steps = rest.unbind(), result.unbind()

        def one_by_one(start: int, stop: int) -> None:
            block, errors = rest[start:stop], torch.empty_like(rest[start:stop])
            shares = spread[start:stop, start:stop].unbind()  # what is done already may change: it is not used again
            for i, error, share in zip(range(start, stop), errors.unbind(), shares, strict=True):
                scale, minimum, lowest, highest = (table[groups[i]] for table in tables)
                torch.div(columns[i].add_(minimum), scale, out=steps[i]).round_().clamp_(lowest, highest)
                torch.addcmul(columns[i], steps[i], scale, value=-1, out=error)
                block.addr_(share, error, alpha=-1)
            block.copy_(errors)

        def pass_on(start: int, middle: int, stop: int) -> None:
            rest[middle:stop].addmm_(spread[start:middle, middle:stop].T, rest[start:middle], alpha=-1)

        _in_halves(0, len(order), one_by_one, pass_on)
        return rest.index_copy_(0, order, result).T.contiguous()

    def _refine(self, W: Tensor, grid: Grid, steps: Tensor, factors: Factors) -> tuple[Grid, Tensor]:
        """One pass of exact coordinate descent on the damped objective: no move can make it larger.

        With e the error of a row and g = H e its gradient, the best move of a group's scale is -<c, g> / <c, H c> over
        the group's steps c, that of its minimum the same over -1 for c; the best move of a step is -g_j / (s H_jj),
        rounded.
        """
        damp, group = factors.damp, self.config.group(W.shape[1])
        error = grid.decode(steps).sub_(W).T
        gradient = (factors.H @ error).add_(error, alpha=damp)
        del error
        scales, minima, lowest, highest = (
            table.T.clone(memory_format=CONTIGUOUS) for table in grid.tables(self.config)
        )
        steps = steps.T.clone(memory_format=CONTIGUOUS)
        for number, (scale, minimum) in enumerate(zip(scales.unbind(), minima.unbind(), strict=True)):
            part = slice(number * group, (number + 1) * group)
            H, c, g = factors.H[part, part], steps[part], gradient[part]
            before = c * scale - minimum
            _fit(c, g, (H @ c).add_(c, alpha=damp), scale, partial(grid.storable, "scale", number=number))
            if grid.minimum is not None:
                curved = H.sum(1, keepdim=True).add_(damp).neg_()
                _fit(curved.new_full((1, 1), -1), g, curved, minimum, partial(grid.storable, "minimum", number=number))
            _move(c, g, H, damp, scale, lowest[number], highest[number])
            gradient[part.stop :].addmm_(factors.H[part.stop :, part], c * scale - minimum - before)
        return grid.under(scales.T.contiguous(), minima.T.contiguous()), steps.T.contiguous()

    def _better_rows(self, W: Tensor, one: tuple[Grid, Tensor], other: tuple[Grid, Tensor], H: Tensor) -> Layer:
        """Of two results for W, in each row the one with the smaller squared output error; `one` is the baseline."""
        baseline, own = _output_error(W, *one, H), _output_error(W, *other, H)
        keep = ~(own <= baseline)[:, None]  # also where an overflow made it no number
        grid = one[0].where(keep, other[0])
        form = grid.form(torch.where(keep, one[1], other[1]), self.config)
        return Layer(form, Objective(torch.where(keep[:, 0], baseline, own), baseline))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return self.config.meta(shape, self.scales or dtype)


def _in_halves(start: int, stop: int, leaf: Callable[[int, int], None], join: Callable[[int, int, int], None]) -> None:
    """Visit columns in order: few at a time one by one; a half is done before its changes reach the other half.

    So nearly all arithmetic is in products of large matrices, at every width.
    """
    if stop - start <= LEAF:
        leaf(start, stop)
        return
    middle = start + max((stop - start) // 2 // LEAF, 1) * LEAF
    _in_halves(start, middle, leaf, join)
    join(start, middle, stop)
    _in_halves(middle, stop, leaf, join)


def _fit(
    direction: Tensor, gradient: Tensor, curved: Tensor, table: Tensor, storable: Callable[[Tensor], Tensor]
) -> None:
    """Move a number of each row [out] to its best value in place, and the gradient [columns, out] with it.

    Args:
        direction: [columns, out], how the weights change with the number.
        gradient: of the objective.
        curved: the Hessian times the direction.
        table: the numbers.
        storable: the nearest number that can be stored.
    """
    slope, curvature = (direction * gradient).sum(0), (direction * curved).sum(0)
    change = storable(table - slope / curvature) - table
    change = torch.where(2 * change * slope + change.square() * curvature < 0, change, 0)
    table.add_(change)
    gradient.add_(curved * change)


def _move(
    steps: Tensor, gradient: Tensor, H: Tensor, damp: float, scale: Tensor, lowest: Tensor, highest: Tensor
) -> None:
    """Move each step [columns, out] to its best value in turn, in place, under the gradient [columns, out]."""
    moved = torch.empty_like(steps)
    stiffness = (H.diagonal() + damp)[:, None] * scale
    columns = [tensor.unbind() for tensor in (steps, gradient, stiffness, moved)]

    def one_by_one(start: int, stop: int) -> None:
        block, rows = gradient[start:stop], H[start:stop, start:stop].unbind()
        for row, step, slope, stiff, change in zip(rows, *(c[start:stop] for c in columns), strict=True):
            torch.addcdiv(step, slope, stiff, value=-1, out=change).round_().clamp_(lowest, highest).sub_(step)
            step.add_(change)
            block.addr_(row, change.mul_(scale))

    def pass_on(start: int, middle: int, stop: int) -> None:
        gradient[middle:stop].addmm_(H[middle:stop, start:middle], moved[start:middle])

    _in_halves(0, len(steps), one_by_one, pass_on)


def _factorise(H: Tensor, order: Tensor, damp: float) -> Factors | None:
    """The factors of H + damp, or None where that is too singular.

    GPTQ needs the upper Cholesky factor U of (H + damp)^-1. That is L^-1 turned by half a circle, for L the ordinary
    Cholesky factor of H + damp with its columns in reverse order: no inverse of H is formed.
    """
    kind = torch.float64 if len(H) <= DOUBLE_WIDTH else torch.float32
    back = order.flip(0)
    panels = _inverse_factor(H, back, damp, kind)
    if panels is None:
        return None
    norms = torch.zeros(len(H), dtype=kind, device=H.device)
    spread = torch.empty_like(H)  # below the diagonal nothing is written, nor used
    while panels:  # from the last, so that the heap shrinks as they go
        panel = panels.pop()
        stop = panel.shape[1]
        start = stop - len(panel)
        norms[:stop] += panel.square().sum(0)
        panel /= panel.diagonal(start)[:, None].clone()
        spread[len(H) - stop : len(H) - start, len(H) - stop :] = panel.flip(0, 1)
    importance = torch.empty_like(H[0]).index_copy_(0, back, (1 / norms).float())
    if not (importance > 0).all():  # overflow: the norm of a column was infinite or no number
        return None
    return Factors(H=H, damp=damp, importance=importance, order=order, spread=spread)


def _inverse_factor(H: Tensor, order: Tensor, damp: float, kind: torch.dtype) -> list[Tensor] | None:
    """The inverse of the Cholesky factor of H[order, order] + damp, or None where that is not positive definite.

    It is lower triangular, and held as panels of rows: the panel of rows [start, stop) has `stop` columns. Each panel
    of the factor follows from the inverse of those above it, so at no time is more than half a matrix held.
    """
    width, device = len(H), H.device
    scratch = torch.empty(2, min(PANEL, width), width, dtype=kind, device=device)  # once: holes in the heap cost memory
    panels: list[Tensor] = []
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        rows = stop - start
        panel = torch.zeros(rows, stop, dtype=kind, device=device)
        A, left = scratch[0, :rows, :stop], scratch[1, :rows, :start]
        A.copy_(H[order[start:stop, None], order[:stop]]).diagonal(start).add_(damp)
        for above in panels:
            last = above.shape[1]
            first = last - len(above)
            torch.mm(A[:, :last], above.T, out=left[:, first:last])
            panel[:, :last].addmm_(left[:, first:last], above, alpha=-1)
        corner, info = torch.linalg.cholesky_ex(A[:, start:].addmm_(left, left.T, alpha=-1))
        if info.item():
            return None
        inverse = torch.linalg.solve_triangular(corner, torch.eye(rows, dtype=kind, device=device), upper=False)
        panel[:, :start] = torch.mm(inverse, panel[:, :start], out=left)
        panel[:, start:] = inverse
        panels.append(panel)
    return panels


def _output_error(W: Tensor, grid: Grid, steps: Tensor, H: Tensor) -> Tensor:
    """Mean squared output error [out] of each row."""
    rest = grid.decode(steps).sub_(W)
    return (rest @ H).mul_(rest).sum(1)


METHOD = Gptq
