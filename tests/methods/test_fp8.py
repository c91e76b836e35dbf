"""FP8 weights: the nearest of all 8-bit floats, under scales that a search may only make better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from llmshrink.forms import Dense, Quantized, decode
from llmshrink.methods.base import Prepared
from llmshrink.methods.fp8 import METHOD


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    w = torch.randn(24, 80, generator=torch.Generator().manual_seed(4)) * torch.logspace(-3, 1, 24)[:, None]
    w[5] = 0
    return w.to(dtype)


def compress(w: Tensor, **settings: Any) -> tuple[Quantized, Tensor]:
    """The form, and its scales."""
    form = METHOD(METHOD.Config(**settings)).compress(w, Prepared()).weight
    assert isinstance(form, Quantized) and isinstance(form.scale, Dense)
    return form, form.scale.weight


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("scales", ["minmax", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_nearest_of_all_floats(per: str, scales: str, dtype: torch.dtype) -> None:
    w = weight(dtype)
    form, scale = compress(w, scale_per=per, scales=scales)
    assert scale.shape == ((24, 1) if per == "channel" else (1, 1)) and scale.dtype == dtype
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    table = table[table.isfinite()]
    exact = (w.float() / scale.float())[..., None].clamp(-448, 448)
    best = (table - exact).abs().amin(-1)
    assert torch.equal((form.codes.float() - exact[..., 0]).abs(), best)


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_covering_scales_are_those_of_compressed_tensors(per: str) -> None:
    w = weight()
    args = QuantizationArgs(num_bits=8, type="float", strategy=per)
    axis = 1 if per == "channel" else (0, 1)
    low, high = w.amin(axis, keepdim=True), w.amax(axis, keepdim=True)
    scale, zero = calculate_qparams(low, high, args)
    codes = quantize(w, scale, zero, args, dtype=torch.float8_e4m3fn)
    form, found = compress(w, scale_per=per, scales="minmax")
    filled = w.abs().amax(1) > 0  # of a row of zeros the scale does not matter
    assert torch.equal(found.expand(24, 1)[filled], scale.expand(24, 1)[filled])
    assert torch.equal(form.codes.float(), codes.float())


def test_no_row_is_worse_for_the_search() -> None:
    w = weight()
    covering, searched = (decode(compress(w, scales=scales)[0]) for scales in ("minmax", "mse"))
    before, after = ((found - w).square().sum(1) for found in (covering, searched))
    assert (after <= before).all() and after.sum() < 0.97 * before.sum()
