"""Casting: the nearest float, and what is too large for it is cut and told."""

from __future__ import annotations

import pytest
import torch

from llmshrink.forms import Dense
from llmshrink.methods.base import Prepared
from llmshrink.methods.cast import Cast, CastConfig


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_weight_becomes_the_nearest_float(dtype: str) -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    layer = Cast(CastConfig(dtype=dtype)).compress(weight, Prepared())
    assert isinstance(layer.weight, Dense) and not layer.events
    assert layer.weight.weight.dtype == getattr(torch, dtype)
    assert torch.equal(layer.weight.weight, weight.to(getattr(torch, dtype)))
    assert layer.weight.weight.data_ptr() != weight.data_ptr()


def test_what_is_too_large_is_cut_and_told() -> None:
    weight = torch.tensor([[1e5, -1e6, 65504.0, 2.0]]).bfloat16()
    layer = Cast(CastConfig(dtype="float16")).compress(weight, Prepared())
    assert isinstance(layer.weight, Dense)
    assert layer.weight.weight.tolist() == [[65504.0, -65504.0, 65504.0, 2.0]]
    assert [(event.kind, event.data) for event in layer.events] == [("overflow", {"weights": 3.0})]
