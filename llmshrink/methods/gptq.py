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

With `weighting: gradient`, tokens weigh in H by what an error of the outputs costs there (GuidedQuant, Kim et al. 2025,
arXiv 2505.07004, with one group of outputs; `engine/slopes.py`).

Weights of a matrix that was pruned are zero, and stay so: their columns are rounded to zero like any other code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmshrink.forms import Event, Layer, Objective
from llmshrink.methods.base import Method, Prepared, Task
from llmshrink.methods.grid import BlockConfig, Grid, choose_grid, round_to
from llmshrink.methods.hessian import DOUBLE_WIDTH, DampConfig, Factors, factorised, in_halves, output_error
from llmshrink.methods.sparsity import kept_before
from llmshrink.statistics import Cross, Fisher, Hessian, Statistic

CONTIGUOUS = torch.contiguous_format
FALLBACK = ("rtn_fallback", "rounded to nearest")


class GptqConfig(BlockConfig, DampConfig):
    """Settings of GPTQ."""

    act_order: bool = Field(True, description="quantize the inputs with the largest mean square first")
    refine: int = Field(1, ge=0, description="passes over all scales and codes after the paper's single one")
    propagate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="what share of the error of the compressed blocks before it a layer makes up for; above 0 the "
        "original's states are computed beside",
    )

    weighting: Literal["hessian", "gradient"] = Field(
        "hessian",
        description="what an error counts: hessian: by what it changes in the layer's outputs; gradient: the same, its "
        "tokens weighed by squared gradients, found in a pass of its own",
    )

    @model_validator(mode="after")
    def _check_weighting(self) -> Self:
        if self.weighting == "gradient" and self.propagate:
            raise ValueError("`propagate` goes with weighting hessian: the original's inputs are not weighed")
        return self


@dataclass(frozen=True, kw_only=True)
class Shifted(Factors):
    """The same where layers aim at the original's outputs."""

    shift: Tensor  # float32 [in, in], of each weight W the target is W + W shift


class Gptq(Method[GptqConfig]):
    """GPTQ with activation order, static groups, searched scales and refinement."""

    task: ClassVar[Task] = "quantize"
    needs = Hessian
    by_row = True
    baseline = "rtn"
    Config = GptqConfig

    @property
    def statistic(self) -> type[Statistic]:
        """The Hessian, its tokens weighed or not; with the original's inputs where their difference is made up for."""
        if self.config.propagate:
            return Cross
        return Fisher if self.config.weighting == "gradient" else Hessian

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be compressed, or None."""
        return self.config.why_not(shape)

    def prepare(self, statistic: Statistic) -> Prepared:
        """Order the columns and factorise the Hessian once for all linears fed by the same tensor.

        Returns:
            Factors, or a plain Prepared with an event where only rounding to nearest is possible.
        """
        assert isinstance(statistic, Hessian)
        found = factorised(
            statistic, self.config, act_order=self.config.act_order, otherwise=FALLBACK, dead=FALLBACK[1]
        )
        if not isinstance(found, Factors) or not isinstance(statistic, Cross):
            return found
        shift = self._shift(statistic, found.damp)
        if shift is not None:
            return Shifted(**vars(found), shift=shift)
        message = "it does not make up for the blocks before: its Hessian is too singular to solve with"
        return replace(found, events=(*found.events, Event("not_propagated", message)))

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
        if isinstance(prepared, Shifted):
            W = W + W @ prepared.shift
        first = choose_grid(W, self.config, kind, prepared.importance)
        kept = None if first.minimum is not None else kept_before(weight)
        grid, steps = first, self._sweep(W, first, prepared, kept)
        for _ in range(self.config.refine):
            grid, steps = self._refine(W, grid, steps, prepared, kept)
        return self._better_rows(W, (first, round_to(first, W, self.config)), (grid, steps), prepared.H)

    def _sweep(self, W: Tensor, grid: Grid, factors: Factors, kept: Tensor | None = None) -> Tensor:
        """Steps [out, in] by the paper's algorithm 1, on a transposed copy so that a column is contiguous."""
        order, spread = factors.order, factors.spread
        tables = [table.T.contiguous().unbind() for table in grid.tables(self.config)]
        groups = (order // self.config.group(len(order))).tolist()
        rest = W.T[order]  # once a column is rounded, the error it leaves
        result = torch.empty_like(rest)
        columns, steps = rest.unbind(), result.unbind()
        stays = None if kept is None else kept.T[order].unbind()

        def one_by_one(start: int, stop: int) -> None:
            block, errors = rest[start:stop], torch.empty_like(rest[start:stop])
            shares = spread[start:stop, start:stop].unbind()  # what is done already may change: it is not used again
            for i, error, share in zip(range(start, stop), errors.unbind(), shares, strict=True):
                scale, minimum, lowest, highest = (table[groups[i]] for table in tables)
                torch.div(columns[i].add_(minimum), scale, out=steps[i]).round_().clamp_(lowest, highest)
                if stays is not None:
                    steps[i].mul_(stays[i])
                torch.addcmul(columns[i], steps[i], scale, value=-1, out=error)
                block.addr_(share, error, alpha=-1)
            block.copy_(errors)

        def pass_on(start: int, middle: int, stop: int) -> None:
            rest[middle:stop].addmm_(spread[start:middle, middle:stop].T, rest[start:middle], alpha=-1)

        in_halves(0, len(order), one_by_one, pass_on)
        return rest.index_copy_(0, order, result).T.contiguous()

    def _refine(
        self, W: Tensor, grid: Grid, steps: Tensor, factors: Factors, kept: Tensor | None = None
    ) -> tuple[Grid, Tensor]:
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
            stays = None if kept is None else kept.T[part]
            _move(c, g, H, damp, scale, lowest[number], highest[number], stays)
            gradient[part.stop :].addmm_(factors.H[part.stop :, part], c * scale - minimum - before)
        return grid.under(scales.T.contiguous(), minima.T.contiguous()), steps.T.contiguous()

    def _better_rows(self, W: Tensor, one: tuple[Grid, Tensor], other: tuple[Grid, Tensor], H: Tensor) -> Layer:
        """Of two results for W, in each row the one with the smaller squared output error; `one` is the baseline."""
        baseline, own = (output_error(W, grid.decode(steps), H) for grid, steps in (one, other))
        keep = ~(own <= baseline)[:, None]  # also where an overflow made it no number
        grid = one[0].where(keep, other[0])
        form = grid.form(torch.where(keep, one[1], other[1]), self.config)
        return Layer(form, Objective(torch.where(keep[:, 0], baseline, own), baseline))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return self.config.meta(shape, self.scales or dtype)


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
    steps: Tensor,
    gradient: Tensor,
    H: Tensor,
    damp: float,
    scale: Tensor,
    lowest: Tensor,
    highest: Tensor,
    kept: Tensor | None,
) -> None:
    """Move each step [columns, out] to its best value in turn, in place, under the gradient [columns, out].

    Where `kept` is false a step stays.
    """
    moved = torch.empty_like(steps)
    stiffness = (H.diagonal() + damp)[:, None] * scale
    columns = [tensor.unbind() for tensor in (steps, gradient, stiffness, moved)]

    def one_by_one(start: int, stop: int) -> None:
        block, rows = gradient[start:stop], H[start:stop, start:stop].unbind()
        stays = None if kept is None else iter(kept[start:stop])
        for row, step, slope, stiff, change in zip(rows, *(c[start:stop] for c in columns), strict=True):
            torch.addcdiv(step, slope, stiff, value=-1, out=change).round_().clamp_(lowest, highest).sub_(step)
            if stays is not None:
                change.mul_(next(stays))
            step.add_(change)
            block.addr_(row, change.mul_(scale))

    def pass_on(start: int, middle: int, stop: int) -> None:
        gradient[middle:stop].addmm_(H[middle:stop, start:middle], moved[start:middle])

    in_halves(0, len(steps), one_by_one, pass_on)


METHOD = Gptq
