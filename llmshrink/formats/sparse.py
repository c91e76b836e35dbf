"""Pruned matrices without their zeros: which weights are kept as one bit each, and the kept ones in a row.

Kept weights lie row by row, in the checkpoint's dtype or as codes of 2 to 8 bits under scales, as flat bytes under the
matrix's own name: a loader that does not know this format fails at the shape, and does not fill in random weights. Of
an N:M pattern each stretch of M inputs names which of the C(M, N) choices it is, which takes ceil(log2 C(M, N)) bits:
3 for 2:4 where a bit for each weight takes 4. transformers loads it once llmshrink is imported (`llmshrink.plugin`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from llmshrink.formats import bits as bitpack
from llmshrink.formats.base import Slot
from llmshrink.formats.own import Entry, OwnFormat, dtype_name, empty
from llmshrink.forms import Dense, Form, Layer, Quantized, Sparse


class SparseFormat(OwnFormat):
    """Bitmask or pattern, and the kept values."""

    name: ClassVar[str] = "sparse"
    parts: ClassVar[tuple[str, ...]] = (".weight", ".weight_mask", ".weight_scale", ".weight_zero")
    marks: ClassVar[tuple[str, ...]] = (".weight_mask",)
    holds_sparse: ClassVar[bool] = True

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Only matrices of which weights were dropped, kept as floats or as plain codes."""
        form = layer.weight
        if not isinstance(form, Sparse):
            return "it is for pruned matrices, and of this one no weight is dropped"
        if not slot.key.endswith(".weight"):
            return "its tensor is not named `.weight`"
        if not isinstance(form.values, Dense):
            scheme = Layer(form.values).scheme
            if scheme is None or scheme.kind != "int" or scheme.whole:
                return "of kept weights it holds floats, or integers with one table of scales"
        return None

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Kept values or codes, which they are, and the scales of codes."""
        form = layer.weight
        assert isinstance(form, Sparse)
        tensors = {slot.key: _packed_values(form), f"{slot.key}_mask": _packed_mask(form)}
        if isinstance(form.values, Quantized):
            assert isinstance(form.values.scale, Dense)
            tensors[f"{slot.key}_scale"] = form.values.scale.weight
            if form.values.zero is not None:
                tensors[f"{slot.key}_zero"] = form.values.zero
        return tensors

    def read(self, key: str, entry: Entry, get: Callable[[str], Tensor]) -> Form:
        """The mask and the values under it."""
        out, width = (int(n) for n in entry["shape"])
        kept, pattern, bits = int(entry["kept"]), _pattern(entry), entry.get("bits")
        mask = _unpacked_mask(get(f"{key}_mask"), (out, width), pattern)
        stored = get(key)
        if bits is None:
            own = stored.clone().view(getattr(torch, entry["dtype"]))
            values: Form = Dense(own.new_zeros(out, width).masked_scatter_(mask, own[:kept]))
        else:
            zero = get(f"{key}_zero") if not entry["symmetric"] else None
            codes = bitpack.signed(bitpack.unpack_flat(stored, bits, kept), bits)
            size = entry["group_size"] or width
            dropped = torch.zeros(out, width, dtype=torch.int8) if zero is None else zero.repeat_interleave(size, 1)
            values = Quantized(
                dropped.masked_scatter(mask, codes), Dense(get(f"{key}_scale")), zero, None, (1, size), bits
            )
        return Sparse(mask, values, kept, pattern)

    def describe(self, layer: Layer) -> Entry:
        """How many weights are kept and where, and how they are stored."""
        form = layer.weight
        assert isinstance(form, Sparse)
        entry: Entry = {"kept": form.kept, "pattern": None if form.pattern is None else "{}:{}".format(*form.pattern)}
        if not isinstance(form.values, Quantized):
            return entry
        scheme = Layer(form.values).scheme
        assert scheme is not None and isinstance(form.values.scale, Dense)
        scales = dtype_name(form.values.scale.weight.dtype)
        own = {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric, "scales": scales}
        return entry | own

    def meta(self, entry: Entry) -> Layer:
        """The structure of a matrix on the `meta` device."""
        out, width = (int(n) for n in entry["shape"])
        bits = entry.get("bits")
        values: Form = Dense(empty((out, width), getattr(torch, entry["dtype"])))
        if bits is not None:
            size = entry["group_size"] or width
            groups = (out, width // size)
            zero = None if entry["symmetric"] else empty(groups, torch.int8)
            scale = Dense(empty(groups, getattr(torch, entry["scales"])))
            values = Quantized(empty((out, width), torch.int8), scale, zero, None, (1, size), bits)
        return Layer(Sparse(empty((out, width), torch.bool), values, int(entry["kept"]), _pattern(entry)))


def _pattern(entry: Entry) -> tuple[int, int] | None:
    if entry["pattern"] is None:
        return None
    n, m = entry["pattern"].split(":")
    return int(n), int(m)


def _packed_values(form: Sparse) -> Tensor:
    """uint8 [bytes]: the kept values in the order of rows, or their codes, whole words of 32 bits."""
    if isinstance(form.values, Dense):
        weight = form.values.weight
        if weight.is_meta:
            return torch.empty(form.kept * weight.itemsize, dtype=torch.uint8, device="meta")
        return weight[form.mask].view(torch.uint8)
    assert isinstance(form.values, Quantized)
    bits = form.values.bits
    if form.values.codes.is_meta:
        return bitpack.pack_flat(empty((form.kept,), torch.uint8), bits)
    return bitpack.pack_flat(bitpack.unsigned(form.values.codes[form.mask], bits), bits)


def _packed_mask(form: Sparse) -> Tensor:
    """uint8 [bytes]: a bit for each weight, or for each stretch of a pattern the number of its choice."""
    mask, total = form.mask, form.mask.numel()
    if form.pattern is None:
        return bitpack.pack_mask(mask)
    n, m = form.pattern
    bits = _choice_bits(n, m)
    if mask.is_meta:
        return bitpack.pack_flat(empty((total // m,), torch.uint8), bits)
    numbers = (mask.view(-1, m).int() << torch.arange(m, dtype=torch.int32, device=mask.device)).sum(1)
    ranks = torch.zeros(1 << m, dtype=torch.int32)
    ranks[_choices(n, m)] = torch.arange(math.comb(m, n), dtype=torch.int32)
    return bitpack.pack_flat(ranks.to(mask.device)[numbers], bits)


def _unpacked_mask(packed: Tensor, shape: tuple[int, int], pattern: tuple[int, int] | None) -> Tensor:
    """Bool [out, in]: the inverse of `_packed_mask`."""
    total = shape[0] * shape[1]
    if pattern is None:
        return bitpack.unpack_mask(packed, total).view(shape)
    n, m = pattern
    ranks = bitpack.unpack_flat(packed, _choice_bits(n, m), total // m).long()
    numbers = _choices(n, m).to(packed.device)[ranks]
    return ((numbers[:, None] >> torch.arange(m, device=packed.device)) & 1).bool().view(shape)


def _choice_bits(n: int, m: int) -> int:
    return max(1, math.ceil(math.log2(math.comb(m, n))))


@cache
def _choices(n: int, m: int) -> Tensor:
    """int64 [C(m, n)]: every choice as a number whose bit i says that input i of the stretch is kept."""
    return torch.tensor([sum(1 << i for i in kept) for kept in combinations(range(m), n)])


FORMAT = SparseFormat()
