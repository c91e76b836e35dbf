"""The Hessian of a layer's inputs, factorised for methods that take one column after another (GPTQ, SparseGPT).

What is done to a column leaves an error, and the columns still to come change so that the outputs do as little as they
can (Frantar and Alistarh 2022, Optimal Brain Compression, arXiv 2208.11580). With the order known, all of these changes
stand in one triangular factor of the inverse (Frantar et al. 2022, arXiv 2210.17323, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Event
from llmshrink.methods.base import MethodConfig, Prepared
from llmshrink.statistics import Hessian

DOUBLE_WIDTH = 4096  # widest Hessian that is factorised in float64
PANEL = 256  # rows of the Hessian that are factorised at a time
LEAF = 16  # columns rounded one by one before what they change reaches the others
LADDER = (1.0, 10.0, 100.0, 1000.0)  # factors on the damping, tried in turn


class DampConfig(MethodConfig):
    """Settings of the methods that solve with a Hessian."""

    damp: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")


@dataclass(frozen=True, kw_only=True)
class Factors(Prepared):
    """What the linears of a group share."""

    H: Tensor  # float32 [in, in], as gathered
    damp: float  # added to its diagonal
    importance: Tensor  # float32 [in], 1 / diag(H^-1): the cost of an error once all other inputs have made up for it
    order: Tensor  # int64 [in], the columns in the order they are rounded
    spread: Tensor  # float32 [in, in] in that order; row i spreads the error of column i. Below the diagonal: undefined
    pivots: Tensor  # float32 [in] in that order, the cost of an error once the inputs after it have made up for it
    adjacent: int = 1  # inputs that stay together in the order


def factorised(
    statistic: Hessian,
    config: DampConfig,
    *,
    act_order: bool,
    otherwise: tuple[str, str],
    dead: str,
    adjacent: int = 1,
) -> Factors | Prepared:
    """Order the columns and factorise the Hessian once for all linears fed by the same tensor.

    Args:
        statistic: of their inputs.
        config: the damping, raised where the Hessian is too singular.
        act_order: the inputs with the largest mean square come first; else the order is theirs.
        otherwise: kind of the event where nothing can be factorised, and what is done then.
        dead: what becomes of the weights of inputs that are always zero.
        adjacent: inputs that stay together in the order.

    Returns:
        Factors, or a plain Prepared with the event.
    """
    H, (kind, words) = statistic.matrix, otherwise
    if statistic.tokens == 0:
        return Prepared((Event(kind, f"{words}: no calibration token reached it"),))
    if not H.sum().isfinite():
        return Prepared((Event(kind, f"{words}: its Hessian is not finite"),))
    diagonal, events = H.diagonal(), []
    zero = int((diagonal <= 0).sum())
    if zero:
        message = f"{zero} of {len(H)} inputs were always zero: their weights are {dead}"
        events.append(Event("dead_columns", message, data={"columns": float(zero)}))
    order = torch.arange(len(H), device=H.device).view(-1, adjacent)
    if act_order:
        order = order[diagonal.view(-1, adjacent).sum(1).argsort(descending=True, stable=True)]
    order = order.flatten()
    mean = float(diagonal.sum()) / max(len(H) - zero, 1) or 1.0
    for share in (config.damp * factor for factor in LADDER):
        factors = _factorise(H, order, share * mean)
        if factors is None:
            continue
        if share > config.damp:
            events.append(Event("damping", f"raised to {share:g} of the mean diagonal", data={"damp": share}))
        return replace(factors, events=tuple(events), adjacent=adjacent)
    failed = Event(kind, f"{words}: the Hessian could not be factorised at any damping")
    return Prepared((*events, failed))


def output_error(W: Tensor, V: Tensor, H: Tensor) -> Tensor:
    """Mean squared output error [out] of each row."""
    rest = V - W
    return (rest @ H).mul_(rest).sum(1)


def descended(
    start: Tensor, residual: Tensor, curved: Callable[[Tensor], Tensor], scale: Tensor, steps: int, enough: float = 0.0
) -> Tensor:
    """Where conjugate gradients lead from `start` [rows, n], all rows at once; it and `residual` are changed in place.

    Args:
        start: where each row begins.
        residual: [rows, n], the right side of the normal equations less what they make of `start`.
        curved: what they make of a direction [rows, n].
        scale: their diagonal, which preconditions; broadcasts to [rows, n].
        steps: at most.
        enough: share of the residual's size at which a row has arrived, and stays.
    """
    step = residual / scale
    direction, along = step.clone(), (residual * step).sum(1, keepdim=True)
    limit = enough**2 * along
    for _ in range(steps):
        bent = curved(direction)
        curvature = (direction * bent).sum(1, keepdim=True)
        length = torch.where((along > limit) & (curvature > 0), along / curvature, 0)
        start += length * direction
        residual -= length * bent
        step = residual / scale
        before, along = along, (residual * step).sum(1, keepdim=True)
        direction = step.add_(direction * (along / before).nan_to_num_(0, 0, 0))
    return start


def in_halves(start: int, stop: int, leaf: Callable[[int, int], None], join: Callable[[int, int, int], None]) -> None:
    """Visit columns in order: few at a time one by one; a half is done before its changes reach the other half.

    So nearly all arithmetic is in products of large matrices, at every width.
    """
    if stop - start <= LEAF:
        leaf(start, stop)
        return
    middle = start + max((stop - start) // 2 // LEAF, 1) * LEAF
    in_halves(start, middle, leaf, join)
    join(start, middle, stop)
    in_halves(middle, stop, leaf, join)


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
    norms, pivots = (torch.zeros(len(H), dtype=kind, device=H.device) for _ in range(2))
    spread = torch.empty_like(H)  # below the diagonal nothing is written, nor used
    while panels:  # from the last, so that the heap shrinks as they go
        panel = panels.pop()
        stop = panel.shape[1]
        start = stop - len(panel)
        norms[:stop] += panel.square().sum(0)
        pivots[len(H) - stop : len(H) - start] = panel.diagonal(start).square().reciprocal().flip(0)
        panel /= panel.diagonal(start)[:, None].clone()
        spread[len(H) - stop : len(H) - start, len(H) - stop :] = panel.flip(0, 1)
    importance = torch.empty_like(H[0]).index_copy_(0, back, (1 / norms).float())
    if not (importance > 0).all():  # overflow: the norm of a column was infinite or no number
        return None
    return Factors(H=H, damp=damp, importance=importance, order=order, spread=spread, pivots=pivots.float())


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
