"""Which few vectors stand for many best: weighted k-means in several dimensions, by Lloyd from k-means++.

No order helps here as on a line, and the optimum is out of reach: centres are drawn with a chance that grows with the
distance to those drawn before (Arthur and Vassilvitskii 2007), and then moved in turn with what is nearest to them
(Lloyd 1982). Of many vectors a sample says where the centres are.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = ((32, 12), (128, 6), (512, 3))  # vectors for each centre that are looked at, and turns: few first, then more
CHEAP = 64  # centres up to which twice as many are looked at twice as often
CELLS = 1 << 18  # distances that are in memory at a time: they stay in a cache


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
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    effort = 2 if count <= CHEAP else 1
    few = order[: effort * ROUNDS[0][0] * count]
    found = _drawn(vectors[few], mass[few], count, generator)
    for each, turns in ROUNDS:
        some = order[: effort * each * count]
        x, w = vectors[some], mass[some]
        for _ in range(effort * turns):
            found = _means(x, w, *nearest(x, w, found), found)
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
        distances = torch.cat([w * x, w], 1) @ right
        codes[part] = smallest(distances)
        least = distances.gather(1, codes[part, None])[:, 0]
        costs[part] = (least + (w * x * x).sum(1)).clamp_(min=0)
    return codes, costs


def smallest(distances: Tensor) -> Tensor:
    """The index of the smallest in each row [..., n]: int64 [...]; torch's own takes 16 times as long on a CPU."""
    if distances.device.type == "cpu":
        return torch.from_numpy(distances.numpy().argmin(-1))
    return distances.argmin(-1)


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
