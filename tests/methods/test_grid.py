"""Scales against the exact optimum, edge cases, and what the stored tables look like."""

from __future__ import annotations

import pytest
import torch
from oracles import least_error_of_any_scale

from llmshrink.forms import decode
from llmshrink.methods.grid import GridConfig, choose_grid, round_to

BITS = (2, 3, 4, 8)


def error(weight: torch.Tensor, config: GridConfig, cost: torch.Tensor | None = None) -> torch.Tensor:
    grid = choose_grid(weight, config, torch.float32, cost)
    rest = weight - decode(grid.form(round_to(grid, weight, config), config))
    rest = rest.square() if cost is None else rest.square() * cost
    return rest.view(*grid.scale.shape, -1).sum(2)


@pytest.mark.parametrize("bits", BITS[:3])
def test_the_search_is_close_to_the_best_of_all_scales(bits: int) -> None:
    torch.manual_seed(bits)
    weight, cost = torch.randn(24, 16), torch.rand(16) + 0.1
    config = GridConfig(bits=bits, group_size=8)
    found = error(weight, config, cost).flatten()
    groups, costs = weight.view(-1, 8), cost.view(2, 8)
    best = torch.tensor([least_error_of_any_scale(w, costs[i % 2], config.code_range) for i, w in enumerate(groups)])
    assert (found >= best * (1 - 1e-4)).all()  # else the reference is no optimum
    assert found.sum() <= 1.06 * best.sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_searching_beats_covering_the_range(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 128)
    searched = error(weight, GridConfig(bits=bits, group_size=32, symmetric=symmetric))
    covering = error(weight, GridConfig(bits=bits, group_size=32, symmetric=symmetric, scales="minmax"))
    assert searched.sum() < covering.sum()


@pytest.mark.parametrize("bits", BITS)
def test_a_grid_finds_the_weights_that_lie_on_it(bits: int) -> None:
    """The long end of the range may point either way: a negative scale says so."""
    config = GridConfig(bits=bits, group_size=-1)
    low, high = config.code_range
    steps = torch.arange(low, high + 1).float().repeat(2, 1)
    weight = steps * torch.tensor([[0.5], [-0.5]])
    grid = choose_grid(weight, config, torch.bfloat16)
    assert torch.equal(grid.scale.float(), torch.tensor([[0.5], [-0.5]]))
    assert torch.equal(round_to(grid, weight, config), steps)


def test_minmax_is_the_usual_convention() -> None:
    weight = torch.tensor([[-3.0, 1.5, 0.0, 6.0]])
    symmetric = choose_grid(weight, GridConfig(bits=4, group_size=-1, scales="minmax"), torch.float32)
    assert symmetric.scale.item() == pytest.approx(6 / 7.5)
    config = GridConfig(bits=4, group_size=-1, scales="minmax", symmetric=False)
    grid = choose_grid(weight, config, torch.float32)
    assert grid.zero is not None
    assert (grid.scale.item(), grid.zero.item()) == (pytest.approx(9 / 15), -3)
    assert decode(grid.form(round_to(grid, weight, config), config))[0, 2] == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scales", ["mse", "minmax"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_groups_without_a_usable_scale(dtype: torch.dtype, scales: str, symmetric: bool) -> None:
    """All zero, one weight alone, denormal and huge: codes in range, tables finite and not zero."""
    config = GridConfig(bits=4, group_size=8, symmetric=symmetric, scales=scales)
    weight = torch.zeros(4, 8)
    weight[1, 3] = 0.7
    weight[2] = torch.finfo(dtype).tiny
    weight[3] = 60000 * torch.tensor([1.0, -1.0]).repeat(4)
    weight = weight.to(dtype).float()
    grid = choose_grid(weight, config, dtype)
    form = grid.form(round_to(grid, weight, config), config)
    assert grid.scale.dtype == dtype
    assert (grid.scale != 0).all()
    assert grid.scale.isfinite().all()
    values = decode(form)
    assert (values[0] == 0).all()
    assert values[1, 3].item() == pytest.approx(0.7, rel=0.07)
    assert (values[3] / weight[3] - 1).abs().max() < 0.2


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_zero_points_stay_in_the_range_of_their_bits(bits: int) -> None:
    torch.manual_seed(1)
    config = GridConfig(bits=bits, group_size=16, symmetric=False)
    weight = torch.randn(8, 64) + torch.linspace(-3, 3, 8)[:, None]  # groups wholly above or below zero too
    grid = choose_grid(weight, config, torch.bfloat16)
    form = grid.form(round_to(grid, weight, config), config)
    assert form.zero is not None
    for table in (form.codes, form.zero):
        assert table.dtype == torch.int8
        assert config.code_range[0] <= table.min() and table.max() <= config.code_range[1]
    assert torch.allclose(decode(form), weight, atol=2.5 * grid.scale.float().abs().max().item())


def test_a_size_that_does_not_divide_is_named() -> None:
    assert "does not divide the width 172" in str(GridConfig(group_size=32).why_not((8, 172)))
    with pytest.raises(ValueError, match="positive"):
        GridConfig(group_size=0)
    assert GridConfig(group_size=-1).why_not((8, 172)) is None
    assert GridConfig(group_size=43).why_not((8, 172)) is None
