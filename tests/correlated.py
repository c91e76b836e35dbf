"""Inputs that are correlated and weights that are not, for methods that weigh one by the other."""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.statistics import Hessian

WIDTH, OUT = 48, 20


def hessian(width: int = WIDTH, tokens: int = 400, seed: int = 0, dead: tuple[int, ...] = ()) -> Hessian:
    """Correlated inputs whose features differ in size."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=random) @ torch.randn(width, width, generator=random)
    x *= torch.linspace(0.2, 2, width)[torch.randperm(width, generator=random)]
    x[:, list(dead)] = 0
    statistic = Hessian(width, torch.device("cpu"))
    statistic.update(x)
    statistic.finish()
    return statistic


def matrix(out: int = OUT, width: int = WIDTH, seed: int = 1) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def normal(shape: tuple[int, int]) -> Tensor:
    """Normal numbers, float64, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
