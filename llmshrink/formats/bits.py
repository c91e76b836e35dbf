"""Dense bit packing: value i of a row at bit i*b, least significant first, crossing word boundaries.

This is the layout of compressed-tensors' pack-quantized since 0.18. For 2, 4 and 8 bits no value crosses a word. `pack`
also runs on the `meta` device, which gives exact shapes without data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmshrink.errors import InputError

CHUNK = 1 << 18  # values that pass through int64 at a time


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n], each below 2^bits -> int32 [rows, ceil(n * bits / 32)]."""
    rows, n = values.shape
    if values.is_meta:  # only the shape is asked for, and often
        return torch.empty(rows, math.ceil(n * bits / 32), dtype=torch.int32, device="meta")
    return torch.cat([_pack(part, bits) for part in torch.split(values, _rows(n))])


def _pack(values: Tensor, bits: int) -> Tensor:
    rows, n = values.shape
    period, words = _period(bits)
    blocks = math.ceil(n / period)
    padded = torch.nn.functional.pad(values, (0, blocks * period - n)).view(rows, blocks, period)
    packed = torch.zeros(rows, blocks, words, dtype=torch.int64, device=values.device)
    for i in range(period):
        word, offset = divmod(i * bits, 32)
        value = padded[:, :, i].long()
        packed[:, :, word] |= (value << offset) & 0xFFFFFFFF
        if offset + bits > 32:
            packed[:, :, word + 1] |= value >> (32 - offset)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return packed.view(rows, blocks * words)[:, : math.ceil(n * bits / 32)].to(torch.int32)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """int32 [rows, ceil(n * bits / 32)] -> uint8 [rows, n]; int32 where they have more than 8 bits."""
    return torch.cat([_unpack(part, bits, n) for part in torch.split(packed, _rows(n))])


def _unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    rows, have = packed.shape
    period, words = _period(bits)
    blocks = math.ceil(n / period)
    padded = torch.nn.functional.pad(packed, (0, blocks * words - have)).view(rows, blocks, words).long() & 0xFFFFFFFF
    kind = torch.uint8 if bits <= torch.iinfo(torch.uint8).bits else torch.int32
    values = torch.empty(rows, blocks, period, dtype=kind, device=packed.device)
    for i in range(period):
        word, offset = divmod(i * bits, 32)
        value = padded[:, :, word] >> offset
        if offset + bits > 32:
            value = value | (padded[:, :, word + 1] << (32 - offset))
        values[:, :, i] = (value & (2**bits - 1)).to(kind)
    return values.view(rows, blocks * period)[:, :n]


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """int8 in [-2^(bits-1), 2^(bits-1)) -> uint8 in [0, 2^bits)."""
    return codes.sub(-(1 << bits - 1)).view(torch.uint8)  # eight bits wrap round, as they should


def signed(codes: Tensor, bits: int) -> Tensor:
    """uint8 in [0, 2^bits) -> int8 in [-2^(bits-1), 2^(bits-1))."""
    return codes.view(torch.int8).add(-(1 << bits - 1))


def _rows(n: int) -> int:
    return max(1, CHUNK // n)


def _period(bits: int) -> tuple[int, int]:
    """After how many values, and words, the pattern of a row repeats."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def decode_scattered(codes: Tensor, scale: Tensor, zero: Tensor | None, groups: Tensor) -> Tensor:
    """The float32 matrix [out, in] behind codes whose inputs lie in the groups that `groups` [in] names.

    Args:
        codes: int8 [out, in].
        scale: [out, number of groups].
        zero: int8, the shape of the scales; None: symmetric.
        groups: as `scattered` gives them.
    """
    values = codes.float()
    return scale.float()[:, groups] * (values if zero is None else values - zero.float()[:, groups])


def scattered(groups: Tensor, size: int, count: int, name: str) -> Tensor | None:
    """The group of each input where adjacent inputs do not share one, or None.

    Readers take it for None too where every input is of group 0 (ExLlama), or an entry is -1 (compressed-tensors):
    tools write that where they reordered nothing.

    Args:
        groups: [in], as stored.
        size: inputs in a group.
        count: groups that have scales.
        name: of the tensor, for the error.

    Raises:
        InputError: a group without scales.
    """
    found = groups.long()
    if not found.any() or bool((found == -1).any()) or torch.equal(found, torch.arange(len(found)) // size):
        return None
    if int(found.min()) < 0 or int(found.max()) >= count:
        raise InputError(f"{name}: it names groups from {int(found.min())} to {int(found.max())} of {count}.")
    return found


def pack_flat(values: Tensor, bits: int) -> Tensor:
    """Integers of any shape below 2^bits, in the order of rows -> uint8 [bytes], whole words of 32 bits."""
    words = math.ceil(values.numel() * bits / 32)
    if values.is_meta:
        return torch.empty(4 * words, dtype=torch.uint8, device="meta")
    rows = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % 32)).view(-1, 32)  # each ends with a word
    return pack(rows, bits).flatten()[:words].view(torch.uint8)


def unpack_flat(packed: Tensor, bits: int, n: int) -> Tensor:
    """uint8 [bytes] -> uint8 [n], or int32 as of `unpack`: the inverse of `pack_flat`; the bytes may lie in a file."""
    if len(packed) != 4 * -(-n * bits // 32):
        raise ValueError(f"{len(packed)} bytes are not {n} codes of {bits} bits")
    words = packed.clone().view(torch.int32)
    rows = torch.nn.functional.pad(words, (0, -len(words) % bits)).view(-1, bits)
    return unpack(rows, bits, 32).flatten()[:n]


def unpack_rows(packed: Tensor, bits: int, width: int, rows: Tensor) -> Tensor:
    """Some rows of a matrix [out, width] behind `unpack_flat`, of which nothing else is unpacked.

    A row need not begin with a word: as few adjacent rows as do are taken together.

    Args:
        packed: uint8 [bytes], in memory or in a file.
        bits: of a value.
        width: values in a row.
        rows: int64 [n], their numbers.

    Returns:
        uint8 [n, width], or int32 as of `unpack`.
    """
    together = 32 // math.gcd(width * bits, 32)
    size = together * width * bits // 8  # bytes
    count, place = len(packed) // size, rows // together
    near = packed[: count * size].view(count, size)[place.clamp(max=count - 1)] if count else packed.new_empty(0)
    if len(packed) > count * size:  # the last of them is not whole
        last = torch.nn.functional.pad(packed[count * size :], (0, (count + 1) * size - len(packed)))
        near = torch.where((place == count)[:, None], last, near if count else last)
    values = unpack(near.view(torch.int32), bits, together * width).view(len(rows), together, width)
    return values[torch.arange(len(rows), device=packed.device), rows % together]


def pack_mask(mask: Tensor) -> Tensor:
    """Bool of any shape -> uint8 [ceil(n / 8)]: a bit each, least significant first."""
    total = mask.numel()
    if mask.is_meta:
        return torch.empty(math.ceil(total / 8), dtype=torch.uint8, device="meta")
    padded = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -total % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, n: int) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool [n]."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:n].bool()
