"""`low-rank`: products of two factors, and codes of what these leave.

On disk a matrix is its left factor under its own name, `weight_right` for the other, and beside pivots
`weight_pivots`, a bit for each row that is a row of the right factor. Factors are floats, or flat codes of 2 to 8 bits
under `_scale`s. The codes of the rest are `weight_rest` and `weight_rest_table`, as the format `codebook` has them.

Matrices that share their right factor have it once: `shared` in the settings names the one beside which it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from llmshrink.formats import bits as bitpack
from llmshrink.formats import codebook
from llmshrink.formats.base import Slot
from llmshrink.formats.own import Entry, OwnFormat, dtype_name, empty
from llmshrink.forms import Codebook, Dense, Form, Layer, LowRank, Quantized, Sum, decode, low_rank, shape_of

Shape = tuple[int, int]
RIGHT, PIVOTS, REST = "_right", "_pivots", "_rest"


class LowRankFormat(OwnFormat):
    """Factors, and what they leave."""

    name: ClassVar[str] = "low-rank"
    parts: ClassVar[tuple[str, ...]] = tuple(
        f".weight{part}"
        for part in ("", "_scale", RIGHT, f"{RIGHT}_scale", PIVOTS, REST, REST + codebook.TABLE, REST + codebook.SCALE)
    )
    marks: ClassVar[tuple[str, ...]] = (f".weight{RIGHT}", f".weight{PIVOTS}")

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Only products, alone or with tables beside them."""
        product = low_rank(layer.weight)
        if product is None:
            return "it is for products of factors, and this matrix is none"
        others = [] if isinstance(layer.weight, LowRank) else _others(layer.weight)
        if len(others) > 1 or not all(isinstance(part, Codebook) for part in others):
            return "beside a product it holds codes into tables of values only"
        if not all(_holds(part) for part in (product.left, product.right)):
            return "of factors it holds floats, or integers with one table of scales"
        if product.shared is not None and product.pivots is None:
            return "a factor is shared only where rows of the products are stored"
        return None if slot.key.endswith(".weight") else "its tensor is not named `.weight`"

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Both factors, the pivots, and the codes of the rest; a right factor that another stores is left to it."""
        product, key = low_rank(layer.weight), slot.key
        assert product is not None
        tensors = _packed(product.left, key)
        if product.shared in (None, slot.name):
            tensors |= _packed(product.right, key + RIGHT)
        if product.pivots is not None:
            tensors[key + PIVOTS] = bitpack.pack_mask(product.pivots)
        for rest in _others(layer.weight):
            assert isinstance(rest, Codebook)
            tensors |= codebook.pack(rest, key + REST)
        return tensors

    def borrowed(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """The right factor that another matrix stores."""
        product = low_rank(layer.weight)
        if product is None or product.shared in (None, slot.name):
            return {}
        return _packed(product.right, f"{product.shared}.weight{RIGHT}")

    def describe(self, layer: Layer) -> Entry:
        """The rank, what the factors are stored as, and the rest."""
        product = low_rank(layer.weight)
        assert product is not None
        rest = [codebook.describe(part) for part in _others(layer.weight) if isinstance(part, Codebook)]
        return {
            "rank": shape_of(product.right)[0],
            "pivots": product.pivots is not None,
            "left": _describe(product.left),
            "right": _describe(product.right),
            "rest": rest[0] if rest else None,
            **(
                {}
                if product.shared is None
                else {"shared": product.shared, "own": [product.own.start, product.own.stop]}
            ),
        }

    def codes(self, key: str, entry: Entry) -> dict[str, int]:
        """Factors that are codes, which no other matrix shares, and the rest."""
        parts = {key: entry["left"], key + RIGHT: entry["right"], key + REST: entry["rest"] or {}}
        return {name: int(part["bits"]) for name, part in parts.items() if "bits" in part}

    def meta(self, entry: Entry) -> Layer:
        """The structure of a matrix on the `meta` device."""
        (out, width), left, right = _shapes(entry)
        pivots = empty((out,), torch.bool) if entry["pivots"] else None
        product = LowRank(_meta(entry["left"], left), _meta(entry["right"], right), pivots, *_sharing(entry))
        rest = entry["rest"] and codebook.meta(entry["rest"], (out, width))
        return Layer(Sum((product, rest)) if rest else product)

    def read(self, key: str, entry: Entry, get: Callable[[str], Tensor]) -> Form:
        """The factors, and the codes of the rest."""
        shape, left, _ = _shapes(entry)
        right, pivots = _beside_left(key, entry, get)
        product = LowRank(_read(entry["left"], left, key, get), right, pivots, *_sharing(entry))
        if entry["rest"] is None:
            return product
        return Sum((product, codebook.read(key + REST, entry["rest"], shape, get)))

    def read_rows(self, key: str, entry: Entry, get: Callable[[str], Tensor], rows: Tensor) -> Form:
        """These rows of the product, and their codes of the rest."""
        shape, _, (rank, width) = _shapes(entry)
        (form, pivots), (first, _) = _beside_left(key, entry, get), _sharing(entry)
        right = decode(form)
        if pivots is not None:
            place = torch.where(pivots, pivots.cumsum(0), (~pivots).cumsum(0))[rows] - 1  # in the factor they stand in
            whole, chosen = right.new_empty(len(rows), width), pivots[rows]
            whole[chosen] = right[first + place[chosen]]
            whole[~chosen] = _factor_rows(entry["left"], rank, key, get, place[~chosen]) @ right
        else:
            whole = _factor_rows(entry["left"], rank, key, get, rows) @ right
        if entry["rest"] is None:
            return Dense(whole)
        return Sum((Dense(whole), codebook.read_rows(key + REST, entry["rest"], shape, get, rows)))

    def factored(self, entry: Entry) -> bool:
        """Where factors are floats and nothing stands beside them."""
        return entry["rest"] is None and all("values" in entry[side] for side in ("left", "right"))


def _beside_left(key: str, entry: Entry, get: Callable[[str], Tensor]) -> tuple[Form, Tensor | None]:
    """The right factor, wherever it is stored, and which rows of the product are rows of it: bool [out], or None."""
    (out, _), left, right = _shapes(entry)
    _, shared = _sharing(entry)
    home = key if shared is None else f"{shared}.weight"
    pivots = bitpack.unpack_mask(get(key + PIVOTS), out) if entry["pivots"] else None
    if pivots is not None and int(pivots.sum()) != out - left[0]:
        raise ValueError(f"{int(pivots.sum())} pivots are not those of rank {out - left[0]}")
    return _read(entry["right"], right, home + RIGHT, get), pivots


def _factor_rows(entry: Entry, rank: int, key: str, get: Callable[[str], Tensor], rows: Tensor) -> Tensor:
    """Rows of a left factor, float32 [n, rank]."""
    if "values" in entry:
        return get(key)[rows].float()
    bits, (tall, wide) = int(entry["bits"]), _block(entry)
    codes = bitpack.signed(bitpack.unpack_rows(get(key), bits, rank, rows), bits)
    scale = Dense(get(f"{key}_scale")[rows // tall])
    return decode(Quantized(codes, scale, None, None, (1, wide), bits))


def _others(form: Form) -> list[Form]:
    """What is added to the product."""
    return [part for part in form.parts if not isinstance(part, LowRank)] if isinstance(form, Sum) else []


def _shapes(entry: Entry) -> tuple[Shape, Shape, Shape]:
    """Of the matrix, of its left and of its right factor."""
    (out, width), rank = (int(n) for n in entry["shape"]), int(entry["rank"])
    first, end = entry.get("own", [0, rank])
    if not 0 <= first <= end <= rank:
        raise ValueError(f"rows {first} to {end} are not among the {rank} of a factor")
    return (out, width), (out - (end - first) if entry["pivots"] else out, rank), (rank, width)


def _sharing(entry: Entry) -> tuple[int, str | None]:
    """The first of a matrix's own rows in its right factor, and the name of the matrix that stores that."""
    return (int(entry["own"][0]), str(entry["shared"])) if "shared" in entry else (0, None)


def _holds(factor: Form) -> bool:
    if isinstance(factor, Dense):
        return True
    if not isinstance(factor, Quantized) or factor.codes.is_floating_point() or isinstance(factor.block, int):
        return False
    extras = (factor.zero, factor.levels, factor.offset, factor.minimum)
    return isinstance(factor.scale, Dense) and all(extra is None for extra in extras)


def _packed(factor: Form, key: str) -> dict[str, Tensor]:
    if isinstance(factor, Dense):
        return {key: factor.weight}
    assert isinstance(factor, Quantized) and isinstance(factor.scale, Dense)
    codes = factor.codes if factor.codes.is_meta else bitpack.unsigned(factor.codes, factor.bits)
    return {key: bitpack.pack_flat(codes, factor.bits), f"{key}_scale": factor.scale.weight}


def _describe(factor: Form) -> Entry:
    if isinstance(factor, Dense):
        return {"values": dtype_name(factor.weight.dtype)}
    assert isinstance(factor, Quantized) and isinstance(factor.scale, Dense) and not isinstance(factor.block, int)
    return {"bits": factor.bits, "block": list(factor.block), "scales": dtype_name(factor.scale.weight.dtype)}


def _meta(entry: Entry, shape: Shape) -> Form:
    if "values" in entry:
        return Dense(empty(shape, getattr(torch, entry["values"])))
    block = _block(entry)
    scales = empty((shape[0] // block[0], shape[1] // block[1]), getattr(torch, entry["scales"]))
    return Quantized(empty(shape, torch.int8), Dense(scales), None, None, block, int(entry["bits"]))


def _read(entry: Entry, shape: Shape, key: str, get: Callable[[str], Tensor]) -> Form:
    if "values" in entry:
        found = get(key)
        if tuple(found.shape) != shape:
            raise ValueError(f"a factor {list(found.shape)} where {list(shape)} is meant")
        return Dense(found)
    bits = int(entry["bits"])
    codes = bitpack.signed(bitpack.unpack_flat(get(key), bits, math.prod(shape)).view(shape), bits)
    return Quantized(codes, Dense(get(f"{key}_scale")), None, None, _block(entry), bits)


def _block(entry: Entry) -> Shape:
    rows, cols = (int(n) for n in entry["block"])
    return rows, cols


FORMAT = LowRankFormat()
