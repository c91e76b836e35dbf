"""How far what is stored is from what was there."""

from __future__ import annotations

import pytest
import torch

from llmshrink.forms import relative_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_error_is_measured_without_touching_the_weights(dtype: torch.dtype) -> None:
    weight = torch.randn(700, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    decoded = weight.float() + 0.1
    kept, also = weight.clone(), decoded.clone()
    expected = float((weight.double() - decoded.double()).norm() / weight.double().norm())
    assert relative_error(weight, decoded) == pytest.approx(expected, rel=1e-9)
    assert torch.equal(weight, kept) and torch.equal(decoded, also)
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
