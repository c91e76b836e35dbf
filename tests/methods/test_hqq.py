"""Half-quadratic grids against a search through all of them, and the sum that they lower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmshrink.forms import Layer, decode
from llmshrink.methods.base import Prepared
from llmshrink.methods.grid import choose_grid
from llmshrink.methods.hqq import Hqq, HqqConfig
from llmshrink.methods.rtn import Rtn, RtnConfig

GROUP = 8


def cost(rest: Tensor, config: HqqConfig) -> Tensor:
    """What rests [..., n], in units, cost together: float64."""
    size = rest.double().abs()
    outlier = (size - size.pow(config.norm - 1) / config.beta).clamp(min=0)
    return (outlier.pow(config.norm) + config.beta / 2 * (size - outlier).square()).sum(-1)


def heavy(seed: int, rows: int = 8) -> Tensor:
    """Weights [rows, 32], some of them far away."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 32, generator=draw) * (1 + 5 * (torch.rand(rows, 32, generator=draw) > 0.9))


def compress(weight: Tensor, config: HqqConfig) -> Layer:
    return Hqq(config).compress(weight, Prepared())


def best_of_all(w: Tensor, unit: float, config: HqqConfig) -> float:
    """The least cost that any scale and zero point give a group [n]."""
    low, high = config.code_range
    zeros = [0] if config.symmetric else list(range(low, high + 1))
    scales = torch.linspace(0.02, 4, 2000) * unit
    least = float("inf")
    for zero in zeros:
        for sign in (1, -1):
            steps = (w / (sign * scales[:, None])).round().clamp(low - zero, high - zero)
            least = min(least, float(cost((w - steps * sign * scales[:, None]) / unit, config).min()))
    return least


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_near_the_best_of_all_grids(bits: int, symmetric: bool) -> None:
    config = HqqConfig(bits=bits, group_size=GROUP, symmetric=symmetric)
    weight = heavy(bits)
    layer = compress(weight, config)
    units = choose_grid(weight, config, torch.float32).scale.abs().flatten()
    rests = (weight - decode(layer.weight)).view(-1, GROUP)
    found = cost(rests / units[:, None], config)
    groups = zip(weight.view(-1, GROUP), units.tolist(), strict=True)
    best = torch.tensor([best_of_all(w, unit, config) for w, unit in groups])
    assert (found >= best * (1 - 0.02)).all(), "else the reference is no optimum"
    assert found.sum() <= 1.15 * best.sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("settings", [{}, {"norm": 0.5, "beta": 8.0}, {"norm": 1.0}])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_never_worse_than_rounding_to_nearest(bits: int, settings: dict[str, Any], symmetric: bool) -> None:
    config = HqqConfig(bits=bits, group_size=16, symmetric=symmetric, **settings)
    objective = compress(heavy(5), config).objective
    assert objective is not None and (objective.own <= objective.baseline).all()
    started_badly = compress(heavy(5), config.model_copy(update={"scales": "minmax"})).objective
    assert started_badly is not None and started_badly.own.sum() < started_badly.baseline.sum()


def test_the_objective_is_that_of_what_is_stored() -> None:
    config = HqqConfig(bits=3, group_size=16)
    weight = heavy(6).bfloat16()
    layer = compress(weight, config)
    units = choose_grid(weight.float(), config, torch.bfloat16).scale.float().abs()
    rests = (weight.float() - decode(layer.weight)).view(*units.shape, -1)
    assert layer.objective is not None
    own = cost(rests / units[..., None], config).sum(1)
    assert torch.allclose(own.float(), layer.objective.own, rtol=1e-4)


def test_outliers_bend_the_grid_less() -> None:
    """With rests held tight only by their power, most weights are met more closely than by the least squares."""
    weight = heavy(7, rows=64)
    robust = compress(weight, HqqConfig(bits=3, group_size=32, beta=20.0))
    squares = Rtn(RtnConfig(bits=3, group_size=32, symmetric=False)).compress(weight, Prepared())
    near, far = ((decode(layer.weight) - weight).abs() for layer in (robust, squares))
    assert near.pow(0.7).sum() < 0.99 * far.pow(0.7).sum() and near.median() < far.median()
    assert near.square().sum() > far.square().sum()
