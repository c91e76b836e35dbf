"""What is computed with is what is stored, bit for bit; gradients against straight-through ones in double precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmshrink.forms import Dense, Quantized, decode
from llmshrink.train.rounding import Rounding

OUT, WIDTH, GROUP = 6, 24, 8


def weights(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(bits: int, *, symmetric: bool, dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """Codes of a grid with scales of both signs, not those nearest to anything."""
    half = 1 << bits - 1
    numbers = torch.Generator().manual_seed(bits)
    codes = torch.randint(-half, half, (OUT, WIDTH), generator=numbers, dtype=torch.int8)
    scale = (0.5 + weights(1, OUT, WIDTH // GROUP).abs()) * weights(2, OUT, WIDTH // GROUP).sign()
    zero = None
    if not symmetric:
        zero = torch.randint(-half, half, (OUT, WIDTH // GROUP), generator=numbers, dtype=torch.int8)
    return Quantized(codes, Dense((0.1 * scale).to(dtype)), zero, None, (1, GROUP), bits)


def moved(rounding: Rounding, latent: Tensor) -> Tensor:
    """All that is learned, somewhere else; returns the latent."""
    with torch.no_grad():
        rounding.factor.add_(0.3 * weights(3, *rounding.factor.shape))
        if rounding.shift is not None:
            rounding.shift.add_(weights(4, *rounding.shift.shape))
        return latent + 0.1 * weights(5, *latent.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_computed_with_is_what_is_stored(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    form, weight = start(bits, symmetric=symmetric, dtype=dtype), weights(0, OUT, WIDTH)
    rounding = Rounding(form)
    latent = rounding.latent(weight, form.codes)
    assert torch.equal(decode(rounding.form(latent)), decode(form))  # it begins with what the method chose
    for where in (latent, moved(rounding, latent)):
        used = rounding(where).detach()
        stored = rounding.form(where)
        assert torch.equal(used, decode(stored))
        assert isinstance(stored.scale, Dense) and stored.scale.weight.dtype == dtype
        assert stored.codes.dtype == torch.int8 and int(stored.codes.abs().max()) <= 1 << bits - 1
    assert not torch.equal(stored.codes, form.codes) and not torch.equal(decode(stored), decode(form))


def test_a_weight_starts_as_near_as_its_code_allows() -> None:
    form, weight = start(3, symmetric=True), weights(0, OUT, WIDTH) / 5
    assert isinstance(form.scale, Dense)
    scale = form.scale.weight.float().repeat_interleave(GROUP, 1)
    latent = Rounding(form).latent(weight, form.codes)
    inside = ((weight / scale) - form.codes).abs() < 0.48
    assert inside.any() and torch.allclose(latent[inside], weight[inside])
    assert ((latent / scale) - form.codes).abs().max() < 0.4901


def reference(rounding: Rounding, form: Quantized, latent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by autograd, in double precision, with roundings that are constants."""
    assert isinstance(form.scale, Dense)
    leaves = {"latent": latent.double(), "factor": rounding.factor.detach().double()}
    if rounding.shift is not None:
        leaves["shift"] = rounding.shift.detach().double()
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    half = 1 << form.bits - 1

    def through(exact: Tensor, rounded: Tensor) -> Tensor:
        return exact + (rounded - exact).detach()

    exact = form.scale.weight.double() * leaves["factor"].exp()
    scale = through(exact, exact.to(form.scale.weight.dtype).double())[..., None]
    zero: Any = 0.0
    if form.zero is not None:
        moved_zero = form.zero.double() + leaves["shift"]
        zero = through(moved_zero, moved_zero.round().clamp(-half, half - 1))[..., None]
    steps = leaves["latent"].view(OUT, -1, GROUP) / scale + zero
    codes = through(steps, steps.round()).clamp(-half, half - 1)
    return ((codes - zero) * scale).view(OUT, WIDTH), leaves


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_pass_as_in_lsq(bits: int, symmetric: bool) -> None:
    form = start(bits, symmetric=symmetric)
    rounding = Rounding(form)
    latent = moved(rounding, rounding.latent(weights(0, OUT, WIDTH), form.codes)).requires_grad_()
    direction = weights(6, OUT, WIDTH)
    (rounding(latent) * direction).sum().backward()
    wanted, leaves = reference(rounding, form, latent.detach())
    (wanted * direction).sum().backward()
    assert torch.allclose(rounding(latent).double(), wanted, atol=1e-6)
    found = {"latent": latent.grad, "factor": rounding.factor.grad}
    if rounding.shift is not None:
        found["shift"] = rounding.shift.grad
    for name, leaf in leaves.items():
        gradient = found[name]
        assert gradient is not None and leaf.grad is not None and leaf.grad.any(), name
        assert torch.allclose(gradient.double(), leaf.grad, rtol=1e-4, atol=1e-5), name
    off = found["latent"] == 0  # cut off by the range
    assert off is not None and 0 < int(off.sum()) < off.numel()


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_was_pruned_stays_zero(symmetric: bool) -> None:
    form = start(2, symmetric=symmetric)
    kept = weights(7, OUT, WIDTH) > 0
    nothing = torch.zeros(OUT, WIDTH // GROUP, dtype=torch.int8) if form.zero is None else form.zero
    codes = torch.where(kept, form.codes, nothing.repeat_interleave(GROUP, 1))
    rounding = Rounding(replace(form, codes=codes), kept=kept)
    latent = moved(rounding, rounding.latent(weights(0, OUT, WIDTH) * kept, codes)).requires_grad_()
    used = rounding(latent)
    used.sum().backward()
    assert torch.equal(used.detach(), decode(rounding.form(latent)))
    assert not used[~kept].any() and used[kept].any() and latent.grad is not None and not latent.grad[~kept].any()
