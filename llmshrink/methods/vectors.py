"""Which few vectors stand for many best: weighted k-means in several dimensions, by Lloyd from k-means++.

No order helps here as on a line, and the optimum is out of reach: centres are drawn with a chance that grows with the
distance to those drawn before (Arthur and Vassilvitskii 2007), and then moved in turn with what is nearest to them
(Lloyd 1982). Of many vectors a sample says where the centres are.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE = 256  # vectors for each centre, from which centres are found
TURNS = 24  # of Lloyd's at most
ENOUGH = 1e-4  # share of the cost that a turn must gain
CELLS = 1 << 22  # distances that are in memory at a time


def centres(vectors: Tensor, weights: Tensor | None, count: int, seed: int = 0) -> Tensor:
    """`count` vectors that stand well for many.

    Args:
        vectors: float32 [n, dim], finite.
        weights: float32 [n, dim], not negative: what the square of an error counts; None: all equal.
        count: of centres, at most n.
        seed: of what is drawn.

    Returns:
        float32 [count, dim].
    """
    generator = torch.Generator().manual_seed(seed)
    mass = torch.ones_like(vectors) if weights is None else weights
    if len(vectors) > SAMPLE * count:
        drawn = torch.randperm(len(vectors), generator=generator)[: SAMPLE * count].to(vectors.device)
        vectors, mass = vectors[drawn], mass[drawn]
    found, before = _drawn(vectors, mass, count, generator), torch.inf
    for _ in range(TURNS):
        codes, costs = nearest(vectors, mass, found)
        found = _means(vectors, mass, codes, costs, found)
        total = float(costs.sum(dtype=torch.float64))
        if before - total <= ENOUGH * before < torch.inf:
            break
        before = total
    return found


def nearest(vectors: Tensor, weights: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of `table` [count, dim] for each vector [n, dim]: its index, int64 [n], and what the error costs."""
    right = torch.cat([-2 * table, table.square()], 1).T.contiguous()
    codes = torch.empty(len(vectors), dtype=torch.long, device=vectors.device)
    costs = torch.empty(len(vectors), device=vectors.device)
    size = max(1, CELLS // len(table))
    for start in range(0, len(vectors), size):
        part = slice(start, start + size)
        x = vectors[part]
        w = torch.ones_like(x) if weights is None else weights[part]
        least, codes[part] = (torch.cat([w * x, w], 1) @ right).min(1)
        costs[part] = (least + (w * x * x).sum(1)).clamp_(min=0)
    return codes, costs


def _drawn(vectors: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres to begin with, each drawn by what its vector costs under those before."""
    costs, chosen = weights.sum(1), list[Tensor]()  # the first by its weight alone
    for number in range(count):
        shares = costs.cumsum(0, dtype=torch.float64)
        at = torch.rand((), generator=generator, dtype=torch.float64).to(shares.device) * shares[-1]
        chosen.append(vectors[torch.searchsorted(shares, at).clamp_(max=len(vectors) - 1)])
        apart = (weights * (vectors - chosen[-1]).square()).sum(1)
        costs = torch.minimum(costs, apart) if number else apart
    return torch.stack(chosen)


def _means(vectors: Tensor, weights: Tensor, codes: Tensor, costs: Tensor, before: Tensor) -> Tensor:
    """The weighted mean of what is nearest to each centre; one that nothing is near goes to the costliest vectors."""
    mass, total = (torch.zeros_like(before).index_add_(0, codes, x) for x in (weights, weights * vectors))
    found = torch.where(mass > 0, total / mass.clamp(min=torch.finfo(torch.float32).tiny), before)
    empty = torch.bincount(codes, minlength=len(before)) == 0
    if number := int(empty.sum()):
        found[empty] = vectors[costs.topk(number).indices]
    return found
