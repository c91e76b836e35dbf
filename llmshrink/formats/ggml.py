"""How ggml lays out the bits of its block types: from the parts of a block to its bytes and back.

A block is a sequence of fields. Integers of few bits are cut into planes: of values v_0 .. v_(per * lanes - 1), byte j
of `lanes` bytes holds v_j, v_(j + lanes), ... from its lowest bit up. The layouts are those of `gguf.quants` of the
package gguf (the oracle of the tests) and of ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink.block_types import BLOCK_TYPES, BlockType
from llmshrink.forms import Dense, Form, Quantized

Parts = dict[str, Tensor]  # of blocks: [rows, blocks, values of one block]


@dataclass(frozen=True)
class Half:
    """A float16 of the block, or its negative."""

    part: str
    negative: bool = False

    bytes = 2

    def write(self, parts: Parts) -> Tensor:
        """Its bytes [rows, blocks, 2]."""
        value = parts[self.part]
        return (-value if self.negative else value).contiguous().view(torch.uint8)

    def read(self, raw: Tensor, parts: Parts) -> None:
        """Set the part."""
        value = raw.contiguous().view(torch.float16)
        parts[self.part] = -value if self.negative else value


@dataclass(frozen=True)
class Planes:
    """Bits `low` .. `low + width - 1` of `count` unsigned integers."""

    part: str
    count: int
    low: int
    width: int
    lanes: int

    @property
    def bytes(self) -> int:
        """Of the field."""
        return self.count * self.width // 8

    def write(self, parts: Parts) -> Tensor:
        """Its bytes."""
        return _to_planes((parts[self.part] >> self.low) & ((1 << self.width) - 1), self.width, self.lanes)

    def read(self, raw: Tensor, parts: Parts) -> None:
        """Add these bits to those of the part that are known."""
        found = _from_planes(raw, self.width, self.lanes) << self.low
        parts[self.part] = parts[self.part] | found if self.part in parts else found


@dataclass(frozen=True)
class Trits:
    """Values 0, 1, 2 from `start` on: `per` of them in a byte, as digits of a fraction in base 3, the highest first."""

    part: str
    start: int
    per: int
    lanes: int

    @property
    def bytes(self) -> int:
        """Of the field."""
        return self.lanes

    def write(self, parts: Parts) -> Tensor:
        """The least byte above the fraction, so that its digits come out by multiplying."""
        values = parts[self.part][..., self.start : self.start + self.per * self.lanes]
        values = values.reshape(*values.shape[:-1], self.per, self.lanes).int()
        powers = torch.tensor([3 ** (4 - i) for i in range(self.per)], device=values.device)[:, None]
        return (((values * powers).sum(-2) * 256 + 242) // 243).to(torch.uint8)

    def read(self, raw: Tensor, parts: Parts) -> None:
        """Append the values to the part."""
        powers = torch.tensor([3**i for i in range(self.per)], device=raw.device)[:, None]
        digits = ((raw[..., None, :].int() * powers & 255) * 3 >> 8).to(torch.uint8).flatten(-2)
        parts[self.part] = torch.cat([parts[self.part], digits], -1) if self.part in parts else digits


@dataclass(frozen=True)
class SixBits:
    """Eight scales and eight minima: four of each in the low bits of four bytes, which keep two bits of the others."""

    bytes = 12

    def write(self, parts: Parts) -> Tensor:
        """The first four of both under the top bits of the last four of both; then the rest of these in nibbles."""
        tables = parts["scales"], parts["minima"]
        heads = [table[..., :4] | (table[..., 4:] >> 4 << 6) for table in tables]
        return torch.cat([*heads, (tables[0][..., 4:] & 15) | (tables[1][..., 4:] << 4)], -1)

    def read(self, raw: Tensor, parts: Parts) -> None:
        """Set both."""
        scales, minima, rest = torch.split(raw, 4, -1)
        parts["scales"] = torch.cat([scales & 63, (rest & 15) | (scales >> 6 << 4)], -1)
        parts["minima"] = torch.cat([minima & 63, (rest >> 4) | (minima >> 6 << 4)], -1)


@dataclass(frozen=True)
class Nibbles:
    """A scale in the low half of each byte, a minimum in the high half."""

    bytes = 16

    def write(self, parts: Parts) -> Tensor:
        """Both in one byte."""
        return parts["scales"] | (parts["minima"] << 4)

    def read(self, raw: Tensor, parts: Parts) -> None:
        """Set both."""
        parts["scales"], parts["minima"] = raw & 15, raw >> 4


Field = Half | Planes | Trits | SixBits | Nibbles


def _codes(count: int, low: int, width: int, lanes: int) -> Planes:
    return Planes("codes", count, low, width, lanes)


D, M, PLUS = Half("d"), Half("m"), Half("m", negative=True)
LAYOUTS: dict[str, tuple[Field, ...]] = {
    "Q4_0": (D, _codes(32, 0, 4, 16)),
    "Q4_1": (D, PLUS, _codes(32, 0, 4, 16)),
    "Q5_0": (D, _codes(32, 4, 1, 1), _codes(32, 0, 4, 16)),
    "Q5_1": (D, PLUS, _codes(32, 4, 1, 1), _codes(32, 0, 4, 16)),
    "Q8_0": (D, _codes(32, 0, 8, 32)),
    "Q2_K": (Nibbles(), _codes(256, 0, 2, 32), D, M),
    "Q3_K": (
        *(_codes(256, 2, 1, 32), _codes(256, 0, 2, 32)),
        *(Planes("scales", 16, 0, 4, 8), Planes("scales", 16, 4, 2, 4), D),
    ),
    "Q4_K": (D, M, SixBits(), _codes(256, 0, 4, 32)),
    "Q5_K": (D, M, SixBits(), _codes(256, 4, 1, 32), _codes(256, 0, 4, 32)),
    "Q6_K": (_codes(256, 0, 4, 64), _codes(256, 4, 2, 32), Planes("scales", 16, 0, 8, 16), D),
    "TQ1_0": (Trits("codes", 0, 5, 32), Trits("codes", 160, 5, 16), Trits("codes", 240, 4, 4), D),
    "TQ2_0": (_codes(256, 0, 2, 32), D),
}


def type_of(form: Form) -> str | None:
    """The block type that stores a form as it is, or None."""
    return next((name for name, kind in BLOCK_TYPES.items() if _is(form, kind)), None)


def _is(form: Form, kind: BlockType) -> bool:
    if not isinstance(form, Quantized) or form.zero is not None or form.offset is not None:
        return False
    levels = None if form.levels is None else tuple(form.levels.tolist())
    tables = [form.scale] if form.minimum is None else [form.scale, form.minimum]
    return (
        (form.bits, form.block, form.minimum is not None, levels)
        == (kind.bits, (1, kind.group), kind.minimum, kind.levels)
        and form.codes.shape[1] % kind.size == 0
        and all(_is_table(table, kind) for table in tables)
    )


def _is_table(table: Form, kind: BlockType) -> bool:
    if not isinstance(table, Quantized):
        return isinstance(table, Dense) and kind.nested is None and table.weight.dtype == torch.float16
    plain = table.zero is None and table.levels is None and table.offset is None and table.minimum is None
    halves = isinstance(table.scale, Dense) and table.scale.weight.dtype == torch.float16
    return plain and halves and (table.bits, table.block) == (kind.nested, (1, kind.size // kind.group))


def pack(form: Quantized) -> Tensor:
    """The bytes of each row: uint8 [out, bytes].

    Raises:
        KeyError: no block type stores this form; `type_of` tells.
    """
    name = type_of(form)
    if name is None:
        raise KeyError("no block type stores this form")
    out, blocks = len(form.codes), form.codes.shape[1] // BLOCK_TYPES[name].size
    if form.codes.is_meta:
        return torch.empty(out, blocks * BLOCK_TYPES[name].bytes, dtype=torch.uint8, device="meta")
    parts = _parts(form, BLOCK_TYPES[name], blocks)
    return torch.cat([field.write(parts) for field in LAYOUTS[name]], -1).view(out, -1)


def _parts(form: Quantized, kind: BlockType, blocks: int) -> Parts:
    """The parts of all blocks; what is signed becomes unsigned."""

    def by_block(codes: Tensor, bits: int) -> Tensor:
        plain = codes if codes.dtype == torch.uint8 else _unsigned(codes, bits)
        return plain.reshape(len(plain), blocks, -1)

    parts = {"codes": by_block(form.codes, form.bits)}
    for table, half, integers in ((form.scale, "d", "scales"), (form.minimum, "m", "minima")):
        if isinstance(table, Quantized):
            parts[integers] = by_block(table.codes, table.bits)
            table = table.scale
        if isinstance(table, Dense):
            parts[half] = table.weight[..., None]
    return parts


def unpack(name: str, packed: Tensor) -> Quantized:
    """The form behind the bytes uint8 [out, bytes] of rows that are stored as this block type."""
    kind, out = BLOCK_TYPES[name], len(packed)
    fields, parts = LAYOUTS[name], Parts()
    split = torch.split(packed.view(out, -1, kind.bytes), [field.bytes for field in fields], -1)
    for field, raw in zip(fields, split, strict=True):
        field.read(raw, parts)
    signed = not kind.minimum and kind.levels is None

    def table(half: str, integers: str) -> Form:
        base = Dense(parts[half].flatten(1))
        if kind.nested is None:
            return base
        codes = parts[integers].flatten(1)
        codes = codes if kind.minimum else _signed(codes, kind.nested)
        return Quantized(codes, base, None, None, (1, kind.size // kind.group), kind.nested)

    codes = parts["codes"].flatten(1)
    return Quantized(
        codes=_signed(codes, kind.bits) if signed else codes,
        scale=table("d", "scales"),
        zero=None,
        levels=None if kind.levels is None else torch.tensor(kind.levels, device=packed.device),
        block=(1, kind.group),
        bits=kind.bits,
        minimum=table("m", "minima") if kind.minimum else None,
    )


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """Eight bits stay as they are; fewer are counted from their lowest value."""
    return codes.view(torch.uint8) if bits == 8 else (codes + (1 << bits - 1)).view(torch.uint8)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return codes.view(torch.int8) if bits == 8 else codes.view(torch.int8) - (1 << bits - 1)


def _to_planes(values: Tensor, width: int, lanes: int) -> Tensor:
    """uint8 [..., n], each below 2^width -> uint8 [..., n * width / 8]."""
    per = 8 // width
    planes = values.view(*values.shape[:-1], -1, per, lanes).unbind(-2)
    packed = planes[0].clone()
    for number, plane in enumerate(planes[1:], 1):
        packed |= plane << number * width
    return packed.flatten(-2)


def _from_planes(raw: Tensor, width: int, lanes: int) -> Tensor:
    """The inverse of `_to_planes`."""
    lines = raw.reshape(*raw.shape[:-1], -1, lanes)
    planes = [(lines >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)]
    return torch.stack(planes, -2).flatten(-3)
