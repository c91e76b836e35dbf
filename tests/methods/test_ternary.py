"""Ternary and binary weights against every threshold there is, and weights that are ternary already."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmshrink.forms import Quantized, decode
from llmshrink.methods import load_method
from llmshrink.methods.base import Prepared


def made(name: str, weight: Tensor, group: int, scales: torch.dtype | None = None) -> Quantized:
    method = load_method(name)
    form = method(method.Config(group_size=group), scales).compress(weight, Prepared()).weight
    assert isinstance(form, Quantized)
    return form


def errors(form: Quantized, weight: Tensor, group: int) -> Tensor:
    return (decode(form) - weight).square().view(-1, group).sum(1)


def least_error(w: Tensor) -> float:
    """The least squared error of ternary weights for a group [n]: of all patterns, each with its best scale."""
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * len(w)).double()
    along, square = codes @ w.double(), codes.square().sum(1)
    gain = (along.square() / square).nan_to_num()
    return float(w.double().square().sum() - gain.max())


@pytest.mark.parametrize("seed", range(3))
def test_no_ternary_weights_are_nearer(seed: int) -> None:
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
    form = made("ternary", weight, 8)
    best = torch.tensor([least_error(w) for w in weight.view(-1, 8)])
    assert torch.allclose(errors(form, weight, 8), best, rtol=1e-5)
    assert set(form.codes.unique().tolist()) == {-1, 0, 1} and (form.bits, form.zero, form.levels) == (2, None, None)


def test_no_binary_weights_are_nearer() -> None:
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    form = made("binary", weight, 8)
    tried = torch.linspace(0, 3, 3001)
    best = (weight.view(-1, 1, 8).abs() - tried[:, None]).square().sum(2).amin(1)
    found = errors(form, weight, 8)
    assert (found <= best * (1 + 1e-5)).all() and torch.allclose(found, best, rtol=1e-3)
    assert set(form.codes.unique().tolist()) == {-1, 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [-1, 32, 128])
@pytest.mark.parametrize(("name", "codes"), [("ternary", [-1.0, 0.0, 1.0]), ("binary", [-1.0, 1.0])])
def test_weights_that_have_such_values_come_out_bit_for_bit(
    name: str, codes: list[float], group: int, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(1)
    chosen = torch.randint(0, len(codes), (24, 256), generator=draw)
    weight = (torch.tensor(codes)[chosen] * 0.0123).to(dtype)
    form = made(name, weight, group)
    assert torch.equal(decode(form).to(dtype), weight) and torch.equal(form.codes.float(), torch.tensor(codes)[chosen])


@pytest.mark.parametrize("name", ["ternary", "binary"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_groups_of_zeros_stay_zero(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[:, 8:16] = 0
    values = decode(made(name, weight, 8))
    assert values.isfinite().all() and not values[:, 8:16].any() and values[:, :8].any()


def test_codes_are_the_nearest_under_the_scale_that_is_stored() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    form = made("ternary", weight, 64, torch.float16)
    scale = decode(form.scale)
    assert decode(form).dtype == torch.float32 and form.scale == form.scale
    tried = torch.stack([(weight - code * scale).square() for code in (-1, 0, 1)])
    assert torch.equal(form.codes.long(), tried.argmin(0) - 1)
