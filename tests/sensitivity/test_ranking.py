"""Orders of columns against brute force: every remaining set is solved anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmshrink.sensitivity import ranking
from llmshrink.sensitivity.ranking import BY_COLUMN, eliminated, of_things


def problem(width: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """A Hessian of correlated inputs, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(400, width, generator=generator, dtype=torch.float64) @ mixing
    return x.T @ x / len(x), torch.randn(outputs, width, generator=generator, dtype=torch.float64)


def loss_without(hessian: Tensor, weight: Tensor, gone: list[int]) -> float:
    """The least tr((W - V) H (W - V)^T) over all V whose columns `gone` are zero."""
    left = [i for i in range(len(hessian)) if i not in gone]
    fitted = torch.zeros_like(weight)
    fitted[:, left] = torch.linalg.solve(hessian[left][:, left], (weight @ hessian)[:, left].T).T
    rest = weight - fitted
    return float((rest @ hessian * rest).sum())


def columns(things: list[int], unit: int) -> list[int]:
    return [thing * unit + i for thing in things for i in range(unit)]


@pytest.mark.parametrize(("unit", "seed"), [(1, 0), (1, 1), (2, 2), (3, 3)])
def test_the_one_that_costs_least_goes_first_then_the_next(unit: int, seed: int) -> None:
    hessian, weight = problem(12, 5, seed)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    gone: list[int] = []
    while len(gone) < 12 // unit - 1:
        rest = [i for i in range(12 // unit) if i not in gone]
        gone.append(min(rest, key=lambda i: loss_without(damped, weight, columns([*gone, i], unit))))
    order = eliminated(hessian, weight, unit, 1, 0.01)
    assert order.tolist() == [*(i for i in range(12 // unit) if i not in gone), *reversed(gone)]


def test_several_go_at_once_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, weight = problem(32, 8, 4)
    exact = eliminated(hessian, weight, 1, 16, 0.01)
    monkeypatch.setattr(ranking, "ROUNDS", 8)
    coarse = eliminated(hessian, weight, 1, 16, 0.01)
    assert sorted(coarse.tolist()) == list(range(32))
    losses = [loss_without(hessian, weight, order[16:].tolist()) for order in (exact, coarse)]
    alone = of_things(BY_COLUMN["wanda"](torch.zeros(32), hessian.diagonal(), weight), 1)
    assert losses[0] <= losses[1] < loss_without(hessian, weight, alone[16:].tolist())


def test_a_copy_of_another_column_goes() -> None:
    hessian, weight = problem(6, 4, 5)
    wide = torch.block_diag(hessian, hessian)
    wide[:6, 6:] = wide[6:, :6] = hessian  # inputs 6 to 11 are those of 0 to 5
    order = eliminated(wide, torch.cat([weight, weight], dim=1), 1, 6, 1e-6)
    assert sorted(i % 6 for i in order[:6].tolist()) == list(range(6))


def test_scores_of_columns() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 5.0, 0.1])
    weight = torch.tensor([[1.0, 1.0, -3.0], [1.0, 0.0, 4.0]])
    mean, square = x.mean(0), x.square().mean(0)
    assert torch.allclose(BY_COLUMN["activation"](mean, square, weight), square)
    assert torch.allclose(BY_COLUMN["wanda"](mean, square, weight), square * torch.tensor([2.0, 1.0, 25.0]))
    spread = x.var(0, correction=0) * torch.tensor([2.0, 1.0, 25.0])
    assert torch.allclose(BY_COLUMN["fluctuation"](mean, square, weight), spread, rtol=1e-3)
    assert of_things(torch.tensor([1.0, 1.0, 5.0, 0.0, 0.0, 3.0]), 2).tolist() == [1, 2, 0]
