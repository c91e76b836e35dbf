"""Every block type against gguf-py's dequantizers, bit for bit, on any bytes."""

from __future__ import annotations

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from llmshrink.block_types import BLOCK_TYPES
from llmshrink.formats import ggml
from llmshrink.forms import Dense, Layer, Quantized, check_blocks, decode, join_rows, split_rows, without_data

ROWS, BLOCKS = 6, 3
QUANTIZED_BY_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")


def random_blocks(name: str) -> Tensor:
    """uint8 [rows, bytes] with every float16 in it finite: a NaN has no one bit pattern."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (ROWS, BLOCKS, BLOCK_TYPES[name].bytes), generator=generator, dtype=torch.uint8)
    at = 0
    for field in ggml.LAYOUTS[name]:
        if isinstance(field, ggml.Half):
            raw[..., at + 1] &= 0b10111111
        at += field.bytes
    return raw.view(ROWS, -1)


def foreign(packed: Tensor, name: str) -> Tensor:
    return torch.from_numpy(dequantize(packed.numpy(), GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_any_bytes_mean_what_gguf_reads(name: str) -> None:
    packed = random_blocks(name)
    form = ggml.unpack(name, packed)
    check_blocks(form)
    ours, theirs = decode(form), foreign(packed, name)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert ggml.type_of(form) == name


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_packing_is_the_inverse(name: str) -> None:
    packed = random_blocks(name)
    again = ggml.pack(ggml.unpack(name, packed))
    if name == "TQ1_0":  # a byte can be a fraction that no five digits give
        assert torch.equal(foreign(again, name), foreign(packed, name))
        packed = again
    assert torch.equal(ggml.pack(ggml.unpack(name, again)), packed)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_sizes_are_those_of_gguf_and_known_without_data(name: str) -> None:
    kind, form = BLOCK_TYPES[name], ggml.unpack(name, random_blocks(name))
    assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == (kind.size, kind.bytes)
    empty = without_data(form)
    planned = ggml.pack(empty)
    assert planned.is_meta and planned.shape == (ROWS, BLOCKS * kind.bytes) and planned.dtype == torch.uint8
    assert ggml.type_of(empty) == name


@pytest.mark.parametrize("name", QUANTIZED_BY_GGUF)
def test_what_gguf_quantizes_is_read_and_written_as_it_is(name: str) -> None:
    weight = torch.randn(ROWS, BLOCKS * 256, generator=torch.Generator().manual_seed(1))
    packed = torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType[name]))
    assert torch.equal(ggml.pack(ggml.unpack(name, packed)), packed)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_can_be_split_and_joined(name: str) -> None:
    packed = random_blocks(name)
    parts = split_rows(Layer(ggml.unpack(name, packed)), [1, ROWS - 1])
    assert [len(decode(part.weight)) for part in parts] == [1, ROWS - 1]
    joined = join_rows(parts).weight
    assert isinstance(joined, Quantized)
    assert torch.equal(decode(joined), foreign(packed, name))


def test_forms_of_other_formats_are_of_no_type() -> None:
    codes, half = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 2, dtype=torch.float16)
    assert ggml.type_of(Quantized(codes, Dense(half), None, None, (1, 32), 4)) == "Q4_0"
    assert ggml.type_of(Quantized(codes, Dense(half.float()), None, None, (1, 32), 4)) is None
    assert ggml.type_of(Quantized(codes, Dense(half), torch.zeros(2, 2, dtype=torch.int8), None, (1, 32), 4)) is None
    assert ggml.type_of(Quantized(codes, Dense(half[:, :1]), None, None, (1, 64), 4)) is None
    assert ggml.type_of(Dense(half)) is None
    with pytest.raises(KeyError, match="no block type"):
        ggml.pack(Quantized(codes, Dense(half), None, None, (1, 32), 3))


def test_tables_that_do_not_cover_the_codes_are_found() -> None:
    form = ggml.unpack("Q4_K", random_blocks("Q4_K"))
    assert isinstance(form.minimum, Quantized)
    short = Quantized(form.minimum.codes[:, 1:], form.minimum.scale, None, None, (1, 8), 6)
    wrong = Quantized(form.codes, form.scale, None, None, form.block, 4, minimum=short)
    with pytest.raises(ValueError, match="do not cover"):
        check_blocks(wrong)
