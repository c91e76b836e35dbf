"""NF4 and FP4: the form means exactly what bitsandbytes reads back."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from llmshrink.forms import Quantized, decode
from llmshrink.methods import load_method
from llmshrink.methods.base import Prepared


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "block"), [((48, 192), 64), ((24, 50), 32), ((7, 33), 64), ((64, 512), 128)])
def test_decode_equals_bitsandbytes(kind: str, double: bool, shape: tuple[int, int], block: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    method_class = load_method(kind)
    method = method_class(method_class.Config(block_size=block, double_quant=double))
    form = method.compress(weight, Prepared()).weight
    assert isinstance(form, Quantized)
    packed, state = quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type=kind)
    assert torch.equal(decode(form), dequantize_4bit(packed, state))
    assert isinstance(form.scale, Quantized) == double


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_what_bitsandbytes_rounds_to_it(dtype: torch.dtype) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    method_class = load_method("nf4")
    form = method_class(method_class.Config()).compress(weight, Prepared()).weight
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(decode(form).to(dtype), dequantize_4bit(packed, state))


def test_widths_that_a_reader_gets_wrong_are_refused() -> None:
    method_class = load_method("nf4")
    method = method_class(method_class.Config(block_size=64))
    assert "96" in str(method.check((48, 96)))
    assert [method.check((48, width)) for width in (64, 172, 192)] == [None] * 3
