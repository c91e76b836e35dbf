"""NF4, FP4 and LLM.int8: the form means exactly what bitsandbytes reads back."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn import Linear8bitLt

from llmshrink.forms import Dense, Layer, Quantized, decode
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_int8_equals_the_linear_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight = torch.randn(24, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    form, linear = int8(weight).weight, linear8bit(weight)
    assert isinstance(form, Quantized) and isinstance(form.scale, Dense)
    codes, largest, _ = int8_vectorwise_quant(weight.half())
    assert torch.equal(form.codes, codes) and torch.equal(form.codes, linear.weight.data)
    assert torch.equal(form.scale.weight[:, 0], largest * (1 / 127)) and not decode(form)[3].any()
    x = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # in training a CPU multiplies decoded weights
        assert torch.equal(linear.train()(x), torch.nn.functional.linear(x, decode(form)))


@pytest.mark.parametrize("threshold", [6.0, 2.5, 0.0])
def test_inputs_are_rounded_as_bitsandbytes_does(threshold: float) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    layer, linear = int8(weight, threshold), linear8bit(weight, threshold)
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(1))
    x[0, 3, 5], x[0, 7, 6], x[0, 4] = 9.0, -7.0, 0.0
    assert layer.input is not None
    with torch.no_grad():
        theirs = linear.eval()(x)
    ours = torch.nn.functional.linear(layer.input.round(x), decode(layer.weight))
    exact = torch.nn.functional.linear(x, decode(layer.weight))
    # Its CPU kernel multiplies by 6.200124e-05 for 1 / 127^2, which is 1.8e-5 more.
    assert torch.allclose(ours, theirs, rtol=3e-5, atol=1e-3)
    assert (theirs - exact).abs().max() > 20 * (theirs - ours).abs().max()
    kept = (layer.input.round(x) == x).all(1)[0]
    assert kept.any() == (threshold > 0) and not kept.all()


def int8(weight: torch.Tensor, threshold: float = 6.0) -> Layer:
    method = load_method("int8")
    return method(method.Config(threshold=threshold)).compress(weight, Prepared())


def linear8bit(weight: torch.Tensor, threshold: float = 6.0) -> Linear8bitLt:
    linear = Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False, threshold=threshold)
    linear.load_state_dict({"weight": weight})
    return linear.to("cpu")
