"""Entropy coding: Huffman's code of aligned codes, the same bits back, and nothing larger than was said."""

from __future__ import annotations

import heapq
import zlib
from collections import Counter

import pytest
import torch
from torch import Tensor

from llmshrink.formats import bits as bitpack
from llmshrink.formats import entropy


def codes_of(bits: int, number: int, spread: float = 0.12) -> Tensor:
    """As frequent as a bell curve makes them."""
    wide = torch.randn(number, generator=torch.Generator().manual_seed(bits)) * spread + 0.5
    return (wide * 2**bits).long().clamp(0, 2**bits - 1).to(torch.uint8)


def huffman_bits(symbols: list[int]) -> int:
    """Bits of the best code of whole bits for each symbol: the sum of all inner nodes of Huffman's tree."""
    heap, total = list(Counter(symbols).values()), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return total


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("number", [1, 31, 96, 97, 1000, 5000])
def test_the_same_bits_come_back(bits: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bitpack.pack_flat(codes_of(bits, number), bits)
    whole = entropy.pack(plain, bits)
    if whole is not None:
        assert len(whole) < len(plain) and torch.equal(entropy.unpack(whole, bits, len(plain)), plain)
    assert whole is None or number >= 1000
    monkeypatch.setattr(entropy, "CHUNK", 96)
    again = entropy.pack(plain, bits)
    assert (whole is None) == (again is None)
    if again is not None and whole is not None:
        assert torch.equal(again, whole) and torch.equal(entropy.unpack(again, bits, len(plain)), plain)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_no_longer_than_huffman_makes_it(bits: int) -> None:
    codes, per = codes_of(bits, 30_000), 8 // bits
    rows = [codes[i : i + per].tolist() for i in range(0, len(codes), per)]
    aligned = [sum(code << place * bits for place, code in enumerate(row)) for row in rows]
    plain = bitpack.pack_flat(codes, bits)
    packed = entropy.pack(plain, bits)
    assert packed is not None
    there = list(zlib.decompress(packed.numpy().tobytes()))
    assert there[: len(aligned)] == aligned and not any(there[len(aligned) :])  # what fills the last word is zero
    assert 0 <= 8 * len(packed) - huffman_bits(aligned) < 8 * 200  # the lengths of its codes, a checksum


def test_what_would_be_no_smaller_stays() -> None:
    even = torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert entropy.pack(even, 8) is None and entropy.pack(even, 4) is None
    assert entropy.pack(torch.zeros(0, dtype=torch.uint8), 4) is None
    zeros = entropy.pack(torch.zeros(8000, dtype=torch.uint8), 3)  # all weights of a matrix are one value
    assert zeros is not None and torch.equal(entropy.unpack(zeros, 3, 8000), torch.zeros(8000, dtype=torch.uint8))


def test_damage_is_seen() -> None:
    plain = bitpack.pack_flat(codes_of(4, 5000), 4)
    packed = entropy.pack(plain, 4)
    assert packed is not None
    for place in range(0, len(packed), 97):
        broken = packed.clone()
        broken[place] ^= 0x10
        with pytest.raises(ValueError, match="packed codes"):
            entropy.unpack(broken, 4, len(plain))
    with pytest.raises(ValueError, match="packed codes"):
        entropy.unpack(packed[:-1], 4, len(plain))
    with pytest.raises(ValueError, match="packed codes"):
        entropy.unpack(torch.cat([packed, packed[:1]]), 4, len(plain))


@pytest.mark.parametrize("size", [2496, 2504])
def test_another_size_is_refused(size: int) -> None:
    packed = entropy.pack(bitpack.pack_flat(codes_of(4, 5000), 4), 4)
    assert packed is not None
    with pytest.raises(ValueError, match="not those of"):
        entropy.unpack(packed, 4, size)


def test_a_bomb_is_refused_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(64 << 20), 9)), dtype=torch.uint8)
    with pytest.raises(ValueError, match="not those of 1000 bytes"):
        entropy.unpack(bomb, 8, 1000)
    monkeypatch.setattr(zlib, "decompressobj", None)
    with pytest.raises(ValueError, match="cannot be"):
        entropy.unpack(bomb, 8, 64 << 20)
    with pytest.raises(ValueError, match="cannot be"):
        entropy.unpack(bomb, 8, 1 << 60)
