"""Ranks against every choice of them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from llmshrink.errors import PlanError
from llmshrink.methods.lowrank import LowRankConfig
from llmshrink.sensitivity.spectrum import Product, best_ranks, tails_of, worth_it


def test_tails_are_shares_of_what_is_behind() -> None:
    tails = tails_of(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    assert torch.allclose(tails, torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0], dtype=torch.float64))
    assert not tails_of(torch.zeros(3, dtype=torch.float64)).any()


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("keep", [0.4, 0.6, 0.85])
def test_ranks_are_those_of_every_choice(by_rows: bool, keep: float) -> None:
    config = LowRankConfig(keep=keep, pivots=by_rows)
    shapes, counts = [(6, 8), (4, 9), (8, 8)], [1, 2, 1]
    generator = torch.Generator().manual_seed(7)
    sizes = [torch.rand(min(shape), generator=generator).double().sort(descending=True)[0] ** 3 for shape in shapes]
    tails = [n * min(shape) * tails_of(size) for n, shape, size in zip(counts, shapes, sizes, strict=True)]

    def numbers(ranks: tuple[int | None, ...]) -> int:
        each = zip(ranks, shapes, counts, strict=True)
        return sum(n * (config.numbers(shape, r) if r else shape[0] * shape[1]) for r, shape, n in each)

    def lost(ranks: tuple[int | None, ...]) -> float:
        return sum(float(tail[rank]) for rank, tail in zip(ranks, tails, strict=True) if rank)

    budget = int(keep * numbers((None, None, None)))
    choices = product(*[[*range(1, config.most(shape) + 1), None] for shape in shapes])
    best = min(lost(ranks) for ranks in choices if numbers(ranks) <= budget)
    found = tuple(best_ranks(config, shapes, counts, tails))
    assert numbers(found) <= budget and lost(found) == pytest.approx(best)


def test_too_little_is_refused() -> None:
    with pytest.raises(PlanError, match="rank 1 everywhere"):
        best_ranks(LowRankConfig(keep=0.1), [(4, 4)], [1], [torch.ones(5)])


def test_only_sets_that_lose_less_share() -> None:
    """At the numbers that private ranks take: one set gains, one does not, one stays whole."""
    config = LowRankConfig(keep=0.5, pivots=True)
    size, shape = 8 * 8, (8, 8)
    falling = size * tails_of(torch.logspace(0, -2, 8, dtype=torch.float64))
    private = [Product((n,), shape, 1, falling) for n in range(6)]
    alike = 2 * size * tails_of(torch.logspace(0, -4, 8, dtype=torch.float64))  # one basis is all that both need
    shared = [Product((n, n + 1), (16, 8), 1, lost) for n, lost in ((0, alike), (2, 4 * falling), (4, alike))]
    ranks: list[int | None] = [3, 3, 3, 3, None, None]
    better, (event,) = worth_it(config, private, ranks, shared)
    assert [product.units for product in better] == [(0, 1)]
    numbers = 2 * config.numbers(shape, 3)
    rank = max(r for r in range(8) if config.numbers((16, 8), r) <= numbers)
    assert event.kind == "shared" and event.data is not None
    assert event.data["lost"] == pytest.approx(float(alike[rank]) / (2 * float(falling[3])))
    none, (event,) = worth_it(config, private, ranks, shared[1:])
    assert none == [] and event.kind == "not_shared" and "none of 2" in event.message
    assert worth_it(config, private, ranks, []) == ([], [])
