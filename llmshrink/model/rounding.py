"""Rounded inputs while a model runs: what comes between a linear and the tensor that it is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.forms import InputScheme
from llmshrink.model.anatomy import Site


def round_inputs(model: nn.Module, sites: Mapping[Site, InputScheme]) -> ExitStack:
    """Round what linears and fused experts multiply from now on, until the stack that is returned is closed.

    Args:
        model: holds the modules that the sites name.
        sites: how the inputs of each are rounded.
    """
    stack = ExitStack()
    experts: dict[str, dict[tuple[int, str], InputScheme]] = {}
    for site, scheme in sites.items():
        if site.expert is not None:
            experts.setdefault(site.module, {})[site.expert, site.leaf] = scheme
            continue
        handle = model.get_submodule(site.module).register_forward_pre_hook(_Rounded(scheme))
        stack.callback(handle.remove)
    for name, schemes in experts.items():
        module: Any = model.get_submodule(name)
        module.rounder = _ByExpert(schemes)
        stack.callback(delattr, module, "rounder")
    return stack


class _Rounded:
    """A hook before a linear."""

    def __init__(self, scheme: InputScheme) -> None:
        self._scheme = scheme

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (straight_through(args[0], self._scheme.round), *args[1:])


class _ByExpert:
    """What fused experts ask for the inputs of each of their matrices."""

    def __init__(self, schemes: Mapping[tuple[int, str], InputScheme]) -> None:
        self._schemes = schemes

    def __call__(self, expert: int, leaf: str, x: Tensor) -> Tensor:
        scheme = self._schemes.get((expert, leaf))
        return x if scheme is None else straight_through(x, scheme.round)


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What float32 numbers are once they were stored in a dtype, float32; gradients pass."""
    return straight_through(x, lambda exact: exact.to(dtype).float())


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounding(x)`, whose gradient is handed on to `x` as it is (Bengio et al. 2013, arXiv 1308.3432)."""
    rounded = rounding(x.detach())
    if not x.requires_grad:
        return rounded
    # torch leaves `apply` untyped.
    passed: Tensor = _StraightThrough.apply(x, rounded)  # type: ignore[no-untyped-call]
    return passed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
