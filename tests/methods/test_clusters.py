"""The best few values against every way of cutting a line into stretches."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from llmshrink.methods import clusters
from llmshrink.methods.clusters import centroids, cost, nearest


def brute_force(values: Tensor, weights: Tensor, count: int) -> float:
    """The least cost of `count` stretches of numbers [n], float64: all of them are tried."""
    values, order = values.double().sort()
    weights, best = weights.double()[order], float("inf")
    for inner in combinations(range(1, len(values)), count - 1):
        total = 0.0
        for start, stop in pairwise((0, *inner, len(values))):
            w, v = weights[start:stop], values[start:stop]
            mean = (w * v).sum() / w.sum() if w.sum() else v.mean()
            total += float((w * (v - mean).square()).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_no_other_stretches_cost_less(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 11, (), generator=generator))
    count = int(torch.randint(1, n + 1, (), generator=generator))
    values = torch.randn(4, n, generator=generator)
    if seed % 3 == 0:
        values = values.mul(2).round()  # some are equal
    weights = torch.rand(4, n, generator=generator) if seed % 2 else torch.ones(4, n)
    weights[0, : n // 2] *= seed % 4 > 1  # some count nothing
    table = centroids(values, weights, count)
    assert table.shape == (4, count) and bool((table.diff(dim=1) >= 0).all())
    for row, found in enumerate(cost(values, weights, table)):
        assert float(found) <= brute_force(values[row], weights[row], count) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("count", [2, 5, 16])
def test_ends_that_move_from_bins_arrive(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(40, 900, generator=generator).bfloat16().float()
    weights = torch.rand(40, 900, generator=generator).pow(3)
    moved = cost(values, weights, centroids(values, weights, count))
    monkeypatch.setattr(clusters, "EXACT", 1 << 40)
    exact = cost(values, weights, centroids(values, weights, count))
    assert bool((moved >= exact * (1 - 1e-9)).all())
    assert float((moved / exact).max()) < 1.005
    assert float((moved <= exact * (1 + 1e-6)).double().mean()) >= 0.9


@pytest.mark.parametrize("seed", range(8))
def test_one_table_is_the_best_there_is(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, 1 << 15, generator=generator)
    values = (values / (torch.rand(1, 1 << 15, generator=generator) + 0.05) if seed % 2 else values).bfloat16().float()
    moved = cost(values, None, centroids(values, None, 16))
    monkeypatch.setattr(clusters, "EXACT", 1 << 40)
    assert float(moved) == pytest.approx(float(cost(values, None, centroids(values, None, 16))), rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_all_costs_in_memory_give_the_same_stretches(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(5, 300, generator=torch.Generator().manual_seed(count))
    whole = centroids(values, None, count)
    monkeypatch.setattr(clusters, "DENSE", 0)
    assert torch.allclose(centroids(values, None, count), whole)


def test_it_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(12, 300, generator=torch.Generator().manual_seed(1))
    whole = centroids(values, None, 8)
    monkeypatch.setattr(clusters, "NUMBERS", 700)
    monkeypatch.setattr(clusters, "CELLS", 500)
    assert torch.equal(centroids(values, None, 8), whole)
    assert torch.equal(centroids(values[:5], None, 8), whole[:5])  # the last of them alone


@pytest.mark.parametrize("weighed", [False, True])
def test_many_numbers_of_16_bits_are_counted(weighed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(1, 3000, generator=generator).bfloat16().float()
    values[0, :2] = torch.tensor([0.0, -0.0])
    weights = torch.rand(1, 3000, generator=generator) if weighed else None
    sorted_ = centroids(values, weights, 9)
    monkeypatch.setattr(clusters, "MANY", 1000)
    assert torch.allclose(centroids(values, weights, 9), sorted_, rtol=1e-6)


def test_fewer_numbers_than_values() -> None:
    values = torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    table = centroids(values, None, 4)
    assert float(cost(values, None, table).sum()) == 0
    assert torch.equal(table.gather(1, nearest(values, table)), values)
