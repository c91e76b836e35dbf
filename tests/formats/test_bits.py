"""Dense bit packing, against compressed-tensors' own packer and bit by bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as some

from llmshrink.formats import bits as bitpack


@given(bits=some.integers(1, 8), rows=some.integers(1, 40), n=some.integers(1, 70), seed=some.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_rows_alone(bits: int, rows: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=generator)
    chosen = torch.randint(0, rows, (7,), generator=generator)
    assert torch.equal(bitpack.unpack_rows(bitpack.pack_flat(values, bits), bits, n, chosen), values[chosen])


@given(
    bits=some.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]),
    rows=some.integers(1, 4),
    n=some.integers(1, 70),
    seed=some.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_every_value_lies_at_bit_i_times_b(bits: int, rows: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=generator)
    packed = bitpack.pack(values, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-n * bits // 32))
    assert torch.equal(bitpack.unpack(packed, bits, n), values)
    for row in range(rows):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(packed[row]))
        assert [(stream >> (i * bits)) & (2**bits - 1) for i in range(n)] == values[row].tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [128, 172, 33])
def test_compressed_tensors_packs_the_same_words(bits: int, width: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, width), dtype=torch.int8)
    theirs = pack_to_int32(codes, bits)
    ours = bitpack.pack((codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), bits)
    assert torch.equal(ours, theirs)


def test_shapes_are_known_without_data() -> None:
    assert bitpack.pack(torch.empty(5, 172, dtype=torch.uint8, device="meta"), 3).shape == (5, 17)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_may_pass_through_in_small_parts(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(2**bits, (7, 45), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    whole = bitpack.pack(values, bits)
    monkeypatch.setattr(bitpack, "CHUNK", 100)
    assert torch.equal(bitpack.pack(values, bits), whole)
    assert torch.equal(bitpack.unpack(whole, bits, 45), values)
