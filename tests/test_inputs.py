"""Rounded inputs are those of compressed-tensors, bit for bit; the scales of static ones are what brute force finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from llmshrink import forms
from llmshrink.forms import LARGEST, CodeKind, InputScheme
from llmshrink.methods.inputs import PERCENTILE, Inputs
from llmshrink.statistics import Range

KINDS: tuple[CodeKind, ...] = ("int", "float")
STATIC = torch.tensor([0.0173])


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, positions, in] of very different sizes: large outliers, a token of zeros, one of tiny values."""
    x = torch.randn(2, 24, 96, generator=torch.Generator().manual_seed(5))
    x[..., 3] *= 60
    x[0, 1], x[1, 2] = 0, x[1, 2] * 1e-30
    return x.to(dtype)


def theirs(x: Tensor, kind: CodeKind, scale: Tensor | None) -> Tensor:
    how: dict[str, Any] = {"strategy": "token", "dynamic": True} if scale is None else {"strategy": "tensor"}
    args = QuantizationArgs(num_bits=8, type=kind, symmetric=True, **how)
    if scale is not None:
        return fake_quantize(x, scale.to(x.dtype), torch.zeros(1, dtype=torch.int8), args)
    found, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    return fake_quantize(x, found, zero, args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [None, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_rounded_as_compressed_tensors_does(
    kind: CodeKind, scale: Tensor | None, dtype: torch.dtype
) -> None:
    x = inputs(dtype)
    before = x.clone()
    ours = InputScheme(kind, scale).round(x)
    assert ours.dtype == dtype and torch.equal(x, before)
    assert torch.equal(ours, theirs(x, kind, scale))


def test_another_divisor_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forms.LARGEST, "int", 127.0)  # type: ignore[misc] # what vLLM's kernel divides by
    assert not torch.equal(InputScheme("int").round(inputs()), theirs(inputs(), "int", None))


def seen(x: Tensor) -> Range:
    found = Range(x.shape[-1], x.device)
    for part in x.reshape(-1, x.shape[-1]).split(13):
        found.update(part)
    found.finish()
    return found


def scale_of(x: Tensor, kind: CodeKind, observer: Any) -> float:
    scheme, event = Inputs(kind, observer).scheme(seen(x), torch.float32)
    assert scheme.scale is not None and scheme.scale.shape == (1,) and event is None
    return float(scheme.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_covers_the_largest_input(kind: CodeKind) -> None:
    x = inputs()
    assert scale_of(x, kind, "minmax") == float(x.abs().max() / LARGEST[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_clips_one_in_ten_thousand(kind: CodeKind) -> None:
    x = torch.randn(2000, 50, generator=torch.Generator().manual_seed(1)) ** 3
    exact = float(x.abs().flatten().double().quantile(PERCENTILE))
    assert scale_of(x, kind, "percentile") * LARGEST[kind] == pytest.approx(exact, rel=1 / 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_mse_clips_where_the_squared_error_is_least(kind: CodeKind, outlier: float) -> None:
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(2))
    x[0, 0] = outlier * x.abs().max()

    def error(scale: float) -> float:
        return float((InputScheme(kind, torch.tensor([scale])).round(x) - x).double().square().sum())

    largest = float(x.abs().max() / LARGEST[kind])
    best = min(error(largest * share / 400) for share in range(20, 401))
    found = error(scale_of(x, kind, "mse"))
    assert found <= 1.03 * best and found <= 1.02 * error(largest)  # it knows magnitudes to 1 in 64


def test_scales_are_rounded_to_what_they_are_stored_in() -> None:
    scheme, _ = Inputs("int", "minmax").scheme(seen(inputs()), torch.bfloat16)
    promised = Inputs("int", "minmax").meta(torch.bfloat16)
    assert scheme.scale is not None and promised.scale is not None
    assert (scheme.scale.dtype, scheme.scale.shape) == (promised.scale.dtype, promised.scale.shape)
    assert float(scheme.scale) == float((inputs().abs().max() / 127.5).bfloat16())


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("x", [torch.zeros(4, 8), torch.empty(0, 8)], ids=["zeros", "nothing"])
def test_a_scale_that_no_data_speaks_for_is_told(observer: Any, x: Tensor) -> None:
    scheme, event = Inputs("int", observer).scheme(seen(x), torch.float32)
    assert scheme.scale is not None and float(scheme.scale) == 1
    assert event is not None and event.kind == "no_inputs"
