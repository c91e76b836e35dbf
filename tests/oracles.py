# ruff: noqa: N803, N806 - W and H are the papers' symbols
"""Brute-force references, float64, slow and obvious: what the fast code must agree with."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from llmshrink.block_types import BlockType


def optimal_brain_quantizer(
    W: Tensor, H: Tensor, order: list[int], scale: Tensor, zero: Tensor, code_range: tuple[int, int]
) -> Tensor:
    """Codes [out, in] of GPTQ without its Cholesky: the Hessian of the columns still free is inverted at every step.

    Args:
        W: [out, in].
        H: [in, in], damping included.
        order: the columns in the order they are rounded.
        scale: [out, in], of every weight.
        zero: [out, in], of every weight.
        code_range: lowest and highest code.
    """
    W, H, scale, zero = W.double().clone(), H.double(), scale.double(), zero.double()
    codes = torch.zeros_like(W)
    for position, column in enumerate(order):
        free = order[position:]
        inverse = torch.linalg.inv(H[free][:, free])
        codes[:, column] = (W[:, column] / scale[:, column] + zero[:, column]).round().clamp(*code_range)
        error = W[:, column] - (codes[:, column] - zero[:, column]) * scale[:, column]
        W[:, free] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes


def least_error_of_any_scale(w: Tensor, cost: Tensor, code_range: tuple[int, int]) -> float:
    """The least weighted squared error that any real scale, of either sign, gives a group w [n] rounded to nearest.

    Codes change only where w / s is half an integer. Between two such scales they are fixed, and the error is a
    parabola in s: its least value on the interval is known exactly.
    """
    low, high = code_range
    w, cost = w.double(), cost.double()
    least = float((cost * w.square()).sum())
    for sign in (1.0, -1.0):
        halves = torch.arange(low, high) + 0.5
        edges = (sign * w[:, None] / halves).flatten()
        edges = edges[edges > 0].sort().values
        edges = torch.cat([edges[:1] / 2, edges, edges[-1:] * 2])
        for left, right in pairwise(edges.tolist()):
            codes = (sign * w / ((left + right) / 2)).round().clamp(low, high)
            square = float((cost * codes.square()).sum())
            if square == 0:
                continue
            scale = min(max(float((cost * codes * sign * w).sum()) / square, left), right)
            least = min(least, float((cost * (sign * w - scale * codes).square()).sum()))
    return least


def coordinate_descent(
    W: Tensor, H: Tensor, scale: Tensor, codes: Tensor, group: int, code_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """One pass over groups, scale first and then each code, every move found from the objective itself (symmetric).

    Args:
        W: [out, in].
        H: [in, in], damping included.
        scale: [out, in / group].
        codes: [out, in].
        group: columns that share a scale.
        code_range: lowest and highest code.

    Returns:
        The new scales, unrounded, and the new codes.
    """
    W, H, scale, codes = W.double(), H.double(), scale.double().clone(), codes.double().clone()

    def objective(row: int) -> float:
        rest = codes[row] * scale[row].repeat_interleave(group) - W[row]
        return float(rest @ H @ rest)

    for row in range(W.shape[0]):
        for g in range(scale.shape[1]):
            inside = slice(g * group, (g + 1) * group)
            others = codes[row] * scale[row].repeat_interleave(group)
            others[inside] = 0
            c = torch.zeros_like(W[row])
            c[inside] = codes[row, inside]
            if float(c @ H @ c) > 0:
                scale[row, g] = (c @ H @ (W[row] - others)) / (c @ H @ c)
            for column in range(inside.start, inside.stop):
                tried = {}
                for code in range(code_range[0], code_range[1] + 1):
                    codes[row, column] = code
                    tried[objective(row)] = code
                codes[row, column] = tried[min(tried)]
    return scale, codes


def least_error_of_any_pair(groups: Tensor, costs: Tensor, high: int, tried: int = 60) -> Tensor:
    """The least weighted squared error found for groups [n, size] stored as s q - m, 0 <= q <= high, over a dense grid.

    Each pair tried gives codes; the error is that of the scale and minimum that fit these codes best.
    """
    x, cost = groups.double(), costs.double()
    least, reach = x.amin(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for begin in torch.linspace(-2, 3, tried).tolist():
        for end in torch.linspace(-2, 3, tried).tolist():
            scale = reach * (1 - (begin + end) / high) / high
            codes = ((x - least - begin * reach / high) / scale).round().clamp(0, high)
            mean_q, mean_x = ((cost * t).sum(1, keepdim=True) / cost.sum(1, keepdim=True) for t in (codes, x))
            q, rest = codes - mean_q, x - mean_x
            slope = (cost * q * rest).sum(1, keepdim=True) / (cost * q * q).sum(1, keepdim=True)
            best = torch.minimum(best, (cost * (rest - slope * q).square()).sum(1))
    return best


def least_error_of_any_integers(
    groups: Tensor, costs: Tensor, kind: BlockType, scale_unit: Tensor, minimum_unit: Tensor | None
) -> Tensor:
    """The least weighted squared error of blocks [n, groups, size] over every integer scale and minimum of a group."""
    (low, high), (first, last) = kind.code_range, kind.scale_range
    best = torch.full(groups.shape[:2], torch.inf, dtype=torch.float64)
    x, cost = groups.double(), costs.double()
    for integer in range(first, last + 1):
        scale = (integer * scale_unit.double())[:, None, None]
        for other in range(last + 1) if minimum_unit is not None else (0,):
            minimum = 0 * scale if minimum_unit is None else (other * minimum_unit.double())[:, None, None]
            codes = ((x + minimum) / scale).nan_to_num(0, 0, 0).round().clamp(low, high)
            best = torch.minimum(best, (cost * (x - codes * scale + minimum).square()).sum(2))
    return best.sum(1)


def optimal_brain_surgeon(W: Tensor, H: Tensor, share: float, together: int, pattern: tuple[int, int] | None) -> Tensor:
    """Weights [out, in] of SparseGPT without its Cholesky: the columns still free are inverted at every step.

    Args:
        W: [out, in].
        H: [in, in], damping included.
        share: of the weights that go.
        together: columns whose mask is chosen at a time; with a pattern, its length.
        pattern: how many of how many adjacent weights of a row stay; None: any of a block.
    """
    W, H, (out, width) = W.double().clone(), H.double(), W.shape
    inverses = [torch.linalg.inv(H[start:, start:]) for start in range(width)]
    mask = torch.ones(out, width, dtype=torch.bool)
    for start in range(0, width, together):
        stop = min(start + together, width)
        cost = torch.stack([W[:, j].square() / inverses[j][0, 0] for j in range(start, stop)], 1)
        if pattern is None:
            gone = round(share * out * stop) - round(share * out * start)
            order = [divmod(int(k), stop - start) for k in cost.flatten().argsort()[:gone]]
        else:
            order = [(row, int(k)) for row in range(out) for k in cost[row].argsort()[: pattern[1] - pattern[0]]]
        for row, column in order:
            mask[row, start + column] = False
        for j in range(start, stop):
            error = W[:, j] * ~mask[:, j]
            W[:, j:] -= error[:, None] * inverses[j][0] / inverses[j][0, 0]
    return W * mask


def least_squares(W: Tensor, mask: Tensor, H: Tensor) -> Tensor:
    """The kept weights [out, in] of least output error tr((V - W) H (V - W)^T): one system for each row."""
    V = torch.zeros_like(W, dtype=torch.float64)
    H = H.double()
    for row, kept in enumerate(mask):
        V[row, kept] = torch.linalg.solve(H[kept][:, kept], (H @ W[row].double())[kept])
    return V
