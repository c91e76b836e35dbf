"""`codebook`: weights as codes into tables of values, which stretches of rows share.

On disk a matrix is its codes, 1 to 8 bits each, as flat bytes under its own name, and `weight_table` [groups, 2^bits]
in the model's dtype: rows i * out / groups to (i + 1) * out / groups share the table i.
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
from llmshrink.forms import Codebook, Form, Layer

TABLE = "_table"


class CodebookFormat(OwnFormat):
    """Codes, and the tables of values that they name."""

    name: ClassVar[str] = "codebook"
    parts: ClassVar[tuple[str, ...]] = (".weight", f".weight{TABLE}")
    marks: ClassVar[tuple[str, ...]] = (f".weight{TABLE}",)

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Only matrices that were clustered."""
        if not isinstance(layer.weight, Codebook):
            return "it is for clustered matrices, and this one has no tables of values"
        return None if slot.key.endswith(".weight") else "its tensor is not named `.weight`"

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Codes in whole words of 32 bits, and the tables."""
        assert isinstance(layer.weight, Codebook)
        return pack(layer.weight, slot.key)

    def read(self, key: str, entry: Entry, get: Callable[[str], Tensor]) -> Form:
        """The codes and their tables."""
        return read(key, entry, _shape(entry), get)

    def read_rows(self, key: str, entry: Entry, get: Callable[[str], Tensor], rows: Tensor) -> Form:
        """The codes of these rows, each with its table."""
        return read_rows(key, entry, _shape(entry), get, rows)

    def describe(self, layer: Layer) -> Entry:
        """Bits of a code, and how many tables of which dtype there are."""
        assert isinstance(layer.weight, Codebook)
        return describe(layer.weight)

    def meta(self, entry: Entry) -> Layer:
        """The structure of a matrix on the `meta` device."""
        return Layer(meta(entry, _shape(entry)))


def pack(form: Codebook, key: str) -> dict[str, Tensor]:
    """The codes as `key`, and the tables beside it."""
    return {key: bitpack.pack_flat(form.codes, form.bits), key + TABLE: form.table}


def read(key: str, entry: Entry, shape: tuple[int, int], get: Callable[[str], Tensor]) -> Codebook:
    """The codes [out, in] behind `key`, and their tables."""
    bits, table = int(entry["bits"]), get(key + TABLE)
    if len(table) < 1 or shape[0] % len(table) or table.shape[1] != 1 << bits:
        raise ValueError(f"tables {list(table.shape)} are not for {shape[0]} rows of {bits} bits")
    return Codebook(bitpack.unpack_flat(get(key), bits, math.prod(shape)).view(shape), table, bits)


def read_rows(key: str, entry: Entry, shape: tuple[int, int], get: Callable[[str], Tensor], rows: Tensor) -> Codebook:
    """The codes [n, in] of some rows behind `key`, and a table for each of them."""
    bits, table = int(entry["bits"]), get(key + TABLE)
    return Codebook(bitpack.unpack_rows(get(key), bits, shape[1], rows), table[rows // (shape[0] // len(table))], bits)


def describe(form: Codebook) -> Entry:
    """What of it is not in its shape."""
    return {"bits": form.bits, "tables": len(form.table), "values": dtype_name(form.table.dtype)}


def meta(entry: Entry, shape: tuple[int, int]) -> Codebook:
    """The structure without data."""
    table = empty((int(entry["tables"]), 1 << int(entry["bits"])), getattr(torch, entry["values"]))
    return Codebook(empty(shape, torch.uint8), table, int(entry["bits"]))


def _shape(entry: Entry) -> tuple[int, int]:
    out, width = (int(n) for n in entry["shape"])
    return out, width


FORMAT = CodebookFormat()
