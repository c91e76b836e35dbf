"""`codebook`: weights as codes into tables of values, which stretches of rows share.

On disk a matrix is its codes, 1 to 8 bits each, as flat bytes under its own name; `weight_table` [groups, 2^bits], rows
i * out / groups to (i + 1) * out / groups sharing the table i, or [groups, 2^bits, dim] where a code stands for `dim`
adjacent inputs; and where rows have scales, `weight_scale` [out], by which a row's values are multiplied. What single
weights have beside their codes is `weight_apart`, row after row, with their columns and how many each row has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from llmshrink.formats import bits as bitpack
from llmshrink.formats.base import Slot
from llmshrink.formats.own import Entry, OwnFormat, dtype_name, empty
from llmshrink.forms import Codebook, Form, Layer, Scattered, Sum

TABLE, SCALE = "_table", "_scale"
BESIDE = ("_apart", "_apart_columns", "_apart_counts")


class CodebookFormat(OwnFormat):
    """Codes, the tables of values that they name, and what these are multiples of."""

    name: ClassVar[str] = "codebook"
    parts: ClassVar[tuple[str, ...]] = tuple(f".weight{part}" for part in ("", TABLE, SCALE, *BESIDE))
    marks: ClassVar[tuple[str, ...]] = (f".weight{TABLE}",)

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Only matrices that were clustered."""
        form = layer.weight
        both = isinstance(form, Sum) and [type(part) for part in form.parts] == [Codebook, Scattered]
        if not both and not isinstance(form, Codebook):
            return "it is for clustered matrices, and this one has no tables of values"
        return None if slot.key.endswith(".weight") else "its tensor is not named `.weight`"

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Codes in whole words of 32 bits, tables and scales, and the weights beside them."""
        book, apart = _parts(layer.weight)
        if apart is None:
            return pack(book, slot.key)
        names = (slot.key + part for part in BESIDE)
        return pack(book, slot.key) | dict(zip(names, (apart.values, apart.columns, apart.counts), strict=True))

    def read(self, key: str, entry: Entry, get: Callable[[str], Tensor]) -> Form:
        """The codes, their tables and scales."""
        out, width = _shape(entry)
        book = read(key, entry, (out, width), get)
        if not entry.get("apart"):
            return book
        values, columns, counts = (get(key + part) for part in BESIDE)
        if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < width:
            raise ValueError(f"a weight beside the codes stands outside of {width} columns")
        return Sum((book, Scattered(values, columns, counts, width)))

    def read_rows(self, key: str, entry: Entry, get: Callable[[str], Tensor], rows: Tensor) -> Form:
        """The codes of these rows, each with its table."""
        book = read_rows(key, entry, _shape(entry), get, rows)
        if not entry.get("apart"):
            return book
        return Sum((book, _apart_of(rows, *(get(key + part) for part in BESIDE), width=_shape(entry)[1])))

    def describe(self, layer: Layer) -> Entry:
        """Bits of a code, and how many tables of which dtype there are."""
        book, apart = _parts(layer.weight)
        if apart is None:
            return describe(book)
        kinds = {"values": dtype_name(apart.values.dtype), "columns": dtype_name(apart.columns.dtype)}
        return {**describe(book), "apart": {"number": len(apart.values), **kinds}}

    def codes(self, key: str, entry: Entry) -> dict[str, int]:
        """The one tensor of codes."""
        return {key: int(entry["bits"])}

    def meta(self, entry: Entry) -> Layer:
        """The structure of a matrix on the `meta` device."""
        (out, width), apart = _shape(entry), entry.get("apart")
        book = meta(entry, (out, width))
        if not apart:
            return Layer(book)
        places, number = getattr(torch, apart["columns"]), (int(apart["number"]),)
        values = empty(number, getattr(torch, apart["values"]))
        return Layer(Sum((book, Scattered(values, empty(number, places), empty((out,), places), width))))


def _apart_of(rows: Tensor, values: Tensor, columns: Tensor, counts: Tensor, *, width: int) -> Scattered:
    """What stands beside the codes of some rows."""
    last = counts.long().cumsum(0)[rows]
    number = counts.long()[rows]
    first = (last - number).repeat_interleave(number)
    before = (number.cumsum(0) - number).repeat_interleave(number)
    places = first + torch.arange(len(first), device=rows.device) - before
    return Scattered(values[places], columns[places], counts[rows], width)


def _parts(form: Form) -> tuple[Codebook, Scattered | None]:
    book, apart = form.parts if isinstance(form, Sum) else (form, None)
    assert isinstance(book, Codebook) and (apart is None or isinstance(apart, Scattered))
    return book, apart


def pack(form: Codebook, key: str) -> dict[str, Tensor]:
    """The codes as `key`, and beside it the tables, and the scales if there are any."""
    table = form.table if form.table.shape[2] > 1 else form.table[..., 0]
    scales = {} if form.scale is None else {key + SCALE: form.scale}
    return {key: bitpack.pack_flat(form.codes, form.bits), key + TABLE: table, **scales}


def read(key: str, entry: Entry, shape: tuple[int, int], get: Callable[[str], Tensor]) -> Codebook:
    """The codes behind `key` of a matrix [out, in], their tables and scales."""
    bits, dim, table = _tables(key, entry, shape, get)
    codes = bitpack.unpack_flat(get(key), bits, math.prod(shape) // dim).view(shape[0], -1)
    return Codebook(codes, table, bits, get(key + SCALE) if entry.get("scales") else None)


def read_rows(key: str, entry: Entry, shape: tuple[int, int], get: Callable[[str], Tensor], rows: Tensor) -> Codebook:
    """The codes [n, in] of some rows behind `key`, and a table for each of them."""
    bits, dim, table = _tables(key, entry, shape, get)
    codes = bitpack.unpack_rows(get(key), bits, shape[1] // dim, rows)
    own = table[rows // (shape[0] // len(table))]
    return Codebook(codes, own, bits, get(key + SCALE)[rows] if entry.get("scales") else None)


def _tables(key: str, entry: Entry, shape: tuple[int, int], get: Callable[[str], Tensor]) -> tuple[int, int, Tensor]:
    """Bits of a code, how many inputs it stands for, and the tables [groups, 2^bits, dim]."""
    bits, dim, table = int(entry["bits"]), int(entry.get("dim", 1)), get(key + TABLE)
    if len(table) < 1 or shape[0] % len(table) or table[0].numel() != dim << bits or shape[1] % dim:
        raise ValueError(f"tables {list(table.shape)} are not for {shape[0]} rows of {bits} bits")
    return bits, dim, table.view(len(table), 1 << bits, dim)


def describe(form: Codebook) -> Entry:
    """What of it is not in its shape."""
    values = {"values": dtype_name(form.table.dtype)}
    dim = {} if form.table.shape[2] == 1 else {"dim": form.table.shape[2]}
    scales = {} if form.scale is None else {"scales": dtype_name(form.scale.dtype)}
    return {"bits": form.bits, **dim, "tables": len(form.table), **values, **scales}


def meta(entry: Entry, shape: tuple[int, int]) -> Codebook:
    """The structure without data."""
    bits, dim = int(entry["bits"]), int(entry.get("dim", 1))
    table = empty((int(entry["tables"]), 1 << bits, dim), getattr(torch, entry["values"]))
    scale = empty(shape[:1], getattr(torch, entry["scales"])) if entry.get("scales") else None
    return Codebook(empty((shape[0], shape[1] // dim), torch.uint8), table, bits, scale)


def _shape(entry: Entry) -> tuple[int, int]:
    out, width = (int(n) for n in entry["shape"])
    return out, width


FORMAT = CodebookFormat()
