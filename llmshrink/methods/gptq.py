"""GPTQ: round one input column at a time and let the columns still to come make up for the error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323. The objective is the squared error of the layer's outputs, tr((W - Q) H (W - Q)^T) with H the mean of
x x^T. Columns are taken in order of falling diag(H) ("activation order"), while groups stay those of adjacent columns.

The paper never returns to a code once it is chosen. Here `refine` does, by coordinate descent on the same objective:
each group's scale and then each code in turn moves to its best value given all the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Event, Layer
from llmshrink.methods.base import Method, Prepared, Task
from llmshrink.methods.grid import Grid, GridConfig, choose_grid, round_to, stored
from llmshrink.statistics import Hessian, Statistic

DOUBLE_WIDTH = 4096  # widest Hessian that is factorised in float64
ROWS = 256  # of a matrix that are converted at a time
LADDER = (1.0, 10.0, 100.0, 1000.0)  # factors on the damping, tried in turn


class GptqConfig(GridConfig):
    """Settings of GPTQ."""

    act_order: bool = Field(True, description="quantize the inputs with the largest mean square first")
    damp: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    block_size: int = Field(64, ge=1, description="columns between two updates of the whole matrix (speed only)")
    refine: int = Field(1, ge=0, description="passes over all scales and codes after the paper's single one")


@dataclass(frozen=True, kw_only=True)
class Factors(Prepared):
    """What the linears of a group share."""

    H: Tensor  # float32 [in, in], as gathered
    damp: float  # added to its diagonal
    importance: Tensor  # float32 [in], 1 / diag(H^-1): the cost of an error once all other inputs have made up for it
    order: Tensor  # int64 [in], the columns in the order they are rounded
    spread: Tensor  # float32 [in, in] in that order, unit upper triangular: row i spreads the error of column i


class Gptq(Method[GptqConfig]):
    """GPTQ with activation order, static groups, searched scales and refinement."""

    task: ClassVar[Task] = "quantize"
    needs = Hessian
    by_row = True
    baseline = "rtn"
    Config = GptqConfig

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
            return replace(factors, events=tuple(events))
        failed = Event("rtn_fallback", "rounded to nearest: the Hessian could not be factorised at any damping")
        return Prepared((*events, failed))

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Quantize one matrix [out, in]; scales are stored in its dtype."""
        W = weight.float()
        plain = choose_grid(W, self.config, weight.dtype)
        if not isinstance(prepared, Factors):
            return Layer(plain.form(round_to(plain, W, self.config), self.config))
        grid = choose_grid(W, self.config, weight.dtype, prepared.importance)
        steps = self._sweep(W, grid, prepared)
        for _ in range(self.config.refine):
            grid, steps = self._refine(W, grid, steps, prepared)
        return self._better_rows(W, (plain, round_to(plain, W, self.config)), (grid, steps), prepared.H)

    def _sweep(self, W: Tensor, grid: Grid, factors: Factors) -> Tensor:
        """Steps [out, in] by the paper's algorithm 1, on a transposed copy so that a column is contiguous."""
        order, size = factors.order, self.config.block_size
        group = self.config.group(len(order))
        tables = [table.float().T.contiguous().unbind() for table in (grid.scale, *grid.limits(self.config))]
        groups = (order // group).tolist()
        rest = W.T[order]
        result = torch.empty_like(rest)
        for start in range(0, len(order), size):
            stop = min(start + size, len(order))
            block, spread = rest[start:stop], factors.spread[start:stop, start:]
            errors = torch.empty_like(block)
            columns = zip(block.unbind(), result[start:stop].unbind(), errors.unbind(), strict=True)
            for i, (w, step, error) in enumerate(columns):
                scale, lowest, highest = (table[groups[start + i]] for table in tables)
                torch.div(w, scale, out=step).round_().clamp_(lowest, highest)
                torch.addcmul(w, step, scale, value=-1, out=error)
                block[i + 1 :].addr_(spread[i, i + 1 : stop - start], error, alpha=-1)
            rest[stop:].addmm_(spread[:, stop - start :].T, errors, alpha=-1)
        return torch.empty_like(result).index_copy_(0, order, result).T.contiguous()

    def _refine(self, W: Tensor, grid: Grid, steps: Tensor, factors: Factors) -> tuple[Grid, Tensor]:
        """One pass of exact coordinate descent on the damped objective: no move can make it larger.

        With e the error of a row and g = H e its gradient, the best move of a group's scale is -<c, g> / <c, H c> over
        the group's steps c; the best move of a step is -g_j / (s H_jj), rounded.
        """
        size, group = self.config.block_size, self.config.group(W.shape[1])
        lowest, highest = (table.T.contiguous() for table in grid.limits(self.config))
        scales, kind = (
            grid.scale.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
            grid.scale.dtype,
        )
        gradient = (grid.decode(steps) - W).T
        gradient = (factors.H @ gradient).add_(gradient, alpha=factors.damp)
        steps = steps.T.clone(memory_format=torch.contiguous_format)
        for number, scale in enumerate(scales.unbind()):
            first, last = number * group, (number + 1) * group
            H = factors.H[first:, first:last].clone()
            H.diagonal().add_(factors.damp)
            c, g = steps[first:last], gradient[first:last]
            slope, curvature = (c * g).sum(0), (c * (H[:group] @ c)).sum(0)
            change = stored(scale - slope / curvature, kind) - scale
            change = torch.where(2 * change * slope + change.square() * curvature < 0, change, 0)
            scale.add_(change)
            gradient[first:].addmm_(H, c * change)
            for start in range(0, group, size):
                stop = min(start + size, group)
                part = slice(start, stop)
                moved = _move(c[part], g[part], H[part, part], scale, lowest[number], highest[number])
                gradient[first + stop :].addmm_(H[stop:, part], moved)
        return Grid(scales.T.to(kind).contiguous(), grid.zero), steps.T.contiguous()

    def _better_rows(self, W: Tensor, one: tuple[Grid, Tensor], other: tuple[Grid, Tensor], H: Tensor) -> Layer:
        """Of two results for W, in each row the one with the smaller squared output error; `one` is the baseline."""
        baseline, own = _output_error(W, *one, H), _output_error(W, *other, H)
        keep = (baseline < own)[:, None]
        zero = None
        if one[0].zero is not None and other[0].zero is not None:
            zero = torch.where(keep, one[0].zero, other[0].zero)
        grid = Grid(torch.where(keep, one[0].scale, other[0].scale), zero)
        total = float(baseline.sum())
        objective = float(torch.minimum(baseline, own).sum()) / total if total else 1.0
        return Layer(grid.form(torch.where(keep, one[1], other[1]), self.config), objective=objective)

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return self.config.meta(shape, dtype)


def _move(steps: Tensor, gradient: Tensor, H: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Move each step [columns, out] to its best value in turn, in place; returns the change of the weights."""
    moved = torch.empty_like(steps)
    stiffness = H.diagonal()[:, None] * scale
    columns = zip(steps.unbind(), gradient.unbind(), stiffness.unbind(), moved.unbind(), strict=True)
    for i, (step, slope, stiff, change) in enumerate(columns):
        torch.addcdiv(step, slope, stiff, value=-1, out=change).round_().clamp_(lowest, highest).sub_(step)
        step.add_(change)
        gradient[i + 1 :].addr_(H[i, i + 1 :], change.mul_(scale))
    return moved


def _factorise(H: Tensor, order: Tensor, damp: float) -> Factors | None:
    """The factors of H + damp, or None where that is too singular.

    GPTQ needs the upper Cholesky factor U of (H + damp)^-1. That is L^-1 turned by half a circle, for L the ordinary
    Cholesky factor of H + damp with its columns in reverse order: no inverse of H is formed.
    """
    kind = torch.float64 if len(H) <= DOUBLE_WIDTH else torch.float32
    back = order.flip(0)
    L = H[back[:, None], back].to(kind).T  # symmetric; transposed, LAPACK works in place
    L.diagonal().add_(damp)
    failed = torch.linalg.cholesky_ex(L, out=(L, torch.empty((), dtype=torch.int32, device=L.device))).info
    if failed.item():
        return None
    _invert_lower(L)
    importance = torch.empty_like(H[0]).index_copy_(0, back, torch.linalg.vector_norm(L, dim=0).pow(-2).float())
    if not (importance > 0).all():  # overflow: the norm of a column was infinite or no number
        return None
    L /= L.diagonal()[:, None].clone()
    spread = torch.empty_like(H)
    for row in range(0, len(H), ROWS):  # a flipped copy of all of L at once would cost more than L
        spread[row : row + ROWS] = L[max(0, len(H) - row - ROWS) : len(H) - row].flip(0, 1)
    return Factors(H=H, damp=damp, importance=importance, order=order, spread=spread)


def _invert_lower(L: Tensor) -> None:
    """Turn a lower triangular matrix into its inverse, in place by halves: float64 copies of it would cost memory."""
    half = len(L) // 2
    if half < 128:
        L.copy_(torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False))
        return
    first, below, second = L[:half, :half], L[half:, :half], L[half:, half:]
    _invert_lower(first)
    _invert_lower(second)
    torch.mm(second, below @ first, out=below).neg_()


def _output_error(W: Tensor, grid: Grid, steps: Tensor, H: Tensor) -> Tensor:
    """Mean squared output error [out] of each row."""
    rest = W - grid.decode(steps)
    return (rest @ H).mul_(rest).sum(1)


METHOD = Gptq
