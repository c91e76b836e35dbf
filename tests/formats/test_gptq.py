"""GPTQ files: against a decoder written from the layout's description, zero points of zero, groups in another order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmshrink.formats import load_format
from llmshrink.formats.base import Slot
from llmshrink.forms import Dense, Layer, Quantized, decode

OUT, IN, GROUP = 64, 96, 32
FORMAT = load_format("gptq")
SLOT = Slot("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj", (OUT, IN), torch.bfloat16)


def layer(bits: int, symmetric: bool, seed: int = 0, group: int = GROUP) -> Layer:
    """Random codes under random scales of both signs; every zero point that there is."""
    draw = torch.Generator().manual_seed(seed)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    codes = torch.randint(low, high + 1, (OUT, IN), generator=draw, dtype=torch.int8)
    scale = torch.randn(OUT, IN // group, generator=draw).half()
    zero = None if symmetric else torch.randint(low, high + 1, (OUT, IN // group), generator=draw, dtype=torch.int8)
    return Layer(Quantized(codes, Dense(scale), zero, None, (1, group), bits))


def bit_by_bit(tensors: dict[str, Tensor], bits: int, version: int = 1) -> Tensor:
    """The matrix [out, in] of a GPTQ layer, read one code at a time: slow, and shares nothing with the package."""

    def value(words: list[int], number: int) -> int:
        stream = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
        return stream >> number * bits & (1 << bits) - 1

    qweight, qzeros, scales, groups = (tensors[n].tolist() for n in ("qweight", "qzeros", "scales", "g_idx"))
    columns = list(zip(*qweight, strict=True))
    out = torch.empty(len(columns), len(groups), dtype=torch.float64)
    for row, column in enumerate(columns):
        for i, group in enumerate(groups):
            zero = value(qzeros[group], row) + (version == 1)
            out[row, i] = scales[group][row] * (value(list(column), i) - zero)
    return out.float()


def parts(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(SLOT.name + "."): tensor for name, tensor in packed.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_file_says_what_the_form_says(bits: int, symmetric: bool) -> None:
    made = layer(bits, symmetric)
    packed = parts(FORMAT.pack(SLOT, made))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()} == {
        "qweight": (torch.int32, (IN * bits // 32, OUT)),
        "qzeros": (torch.int32, (IN // GROUP, OUT * bits // 32)),
        "scales": (torch.float16, (IN // GROUP, OUT)),
        "g_idx": (torch.int32, (IN,)),
    }
    assert torch.equal(bit_by_bit(packed, bits), decode(made.weight))
    back = FORMAT.unpack(SLOT, FORMAT.pack(SLOT, made).__getitem__, FORMAT.config([(SLOT, made)], [], torch.bfloat16))
    assert torch.equal(decode(back), decode(made.weight))


def test_symmetric_zero_points_are_the_constant_that_loaders_expect() -> None:
    for bits, word in ((4, 0x77777777), (8, 0x7F7F7F7F), (2, 0x55555555)):
        assert (parts(FORMAT.pack(SLOT, layer(bits, True)))["qzeros"] == word).all()


def test_no_zero_point_is_stored_below_zero() -> None:
    made = layer(4, symmetric=False)
    assert isinstance(made.weight, Quantized) and made.weight.zero is not None
    made.weight.zero[:] = -8  # unsigned: zero
    packed = parts(FORMAT.pack(SLOT, made))
    assert (packed["qzeros"] == 0xEEEEEEEE - 2**32).all()  # 15, less one
    assert torch.equal(bit_by_bit(packed, 4), decode(made.weight))


@pytest.mark.parametrize("version", [1, 2])
def test_groups_in_any_order_are_read(version: int) -> None:
    made = layer(4, symmetric=False)
    tensors = FORMAT.pack(SLOT, made)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(1)).to(torch.int32) // GROUP
    tensors[f"{SLOT.name}.g_idx"] = order
    config = {"bits": 4, "group_size": GROUP, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    if version == 2:
        tensors[f"{SLOT.name}.qzeros"] = tensors[f"{SLOT.name}.qzeros"] + 0x11111111  # as loaders turn one into two
    found = FORMAT.unpack(SLOT, tensors.__getitem__, config)
    assert isinstance(found, Dense)
    assert torch.equal(found.weight, bit_by_bit(parts(tensors), 4, version))


def test_files_without_groups_of_each_input_are_read() -> None:
    made = layer(4, symmetric=True)
    tensors = FORMAT.pack(SLOT, made)
    del tensors[f"{SLOT.name}.g_idx"]
    config = FORMAT.config([(SLOT, made)], [], torch.bfloat16)
    assert torch.equal(decode(FORMAT.unpack(SLOT, tensors.__getitem__, config)), decode(made.weight))
    assert FORMAT.dense_info(SLOT.key, tensors.__getitem__, config) == ((OUT, IN), torch.float16)


def at(block: int, name: str) -> Slot:
    module = f"model.layers.{block}.{name}"
    return Slot(f"{module}.weight", module, (OUT, IN), torch.bfloat16)


def test_linears_that_are_left_are_told_to_the_loader() -> None:
    made = layer(4, symmetric=True)
    given = [(at(block, name), made) for block in (0, 1) for name in ("a.q", "b.up")]
    config: Any = FORMAT.config(given, ["lm_head"], torch.bfloat16)
    assert "modules_in_block_to_quantize" not in config
    config = FORMAT.config(given, ["lm_head", "model.layers.0.b.down", "model.layers.1.b.down"], torch.bfloat16)
    assert config["modules_in_block_to_quantize"] == [["a.q", "b.up"]]
    assert FORMAT.files(config) == {"quantize_config.json": config}


def test_what_the_loader_cannot_be_told_is_refused() -> None:
    made, other = layer(4, symmetric=True), layer(8, symmetric=True)
    both = [(at(block, "a.q"), made) for block in (0, 1)]
    assert FORMAT.check_all(both, ["lm_head"]) is None
    assert "one scheme" in (FORMAT.check_all([*both, (at(0, "b.up"), other)], []) or "")
    assert "some blocks" in (FORMAT.check_all([*both, (at(0, "b.up"), made)], []) or "")
    assert "all of model.layers.2" in (FORMAT.check_all(both, ["model.layers.2.a.q"]) or "")
    assert "outside" in (FORMAT.check_all([(Slot("lm_head.weight", "lm_head", (OUT, IN), torch.half), made)], []) or "")
    odd = Slot("model.layers.0.a.q.weight", "model.layers.0.a.q", (40, IN), torch.bfloat16)
    assert "whole words" in (FORMAT.check(odd, layer(3, symmetric=True)) or "")
