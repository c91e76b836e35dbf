"""The forms themselves: frozen, and nested in each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LOOKED_UP = 1 << 20  # codes that are looked up at a time
CodeKind = Literal["int", "float"]  # of 8-bit numbers: int8, or float8_e4m3fn
InputKind = CodeKind | Literal["llm-int8", "bitnet"]


@dataclass(frozen=True)
class Dense:
    """A matrix (or table of scales) stored as it is."""

    weight: Tensor  # any shape, any float dtype


@dataclass(frozen=True)
class Quantized:
    """Codes, integers or 8-bit floats, under a table of scales.

    `block` says which weights share a scale: a pair (rows, cols) tiles the matrix, e.g. (1, 128) for groups of 128
    inputs, (1, in) for one scale per output channel, (out, in) for one of the whole matrix; an int counts weights of
    the flattened matrix (bitsandbytes).

    A weight means `scale * (code - zero)`, or `scale * levels[code]` where a table of levels is given; `minimum`, where
    there is one, is subtracted from that.
    """

    codes: Tensor  # [out, in]; int8 in [-2^(bits-1), 2^(bits-1)-1], uint8 from 0 or into `levels`, or float8_e4m3fn
    scale: Form  # decodes to [out / rows, in / cols], or [ceil(out * in / block)]
    zero: Tensor | None  # int8, the shape of the scales, signed like the codes; None: symmetric
    levels: Tensor | None  # float32, one for each code, None for an even grid
    block: tuple[int, int] | int
    bits: int
    offset: Tensor | None = None  # float32 scalar added to what the codes mean (the mean of a nested scale table)
    minimum: Form | None = None  # the shape of the scales; None: nothing is subtracted

    @property
    def scheme(self) -> Scheme | None:
        """What a loader must be told to decode it; None for levels, minima, nested scales and ones of some rows."""
        plain = self.levels is None and self.minimum is None and isinstance(self.scale, Dense)
        if not plain or isinstance(self.block, int):
            return None
        (rows, size), (out, width) = self.block, self.codes.shape
        whole = (rows, size) == (out, width) and out > 1
        if rows != 1 and not whole:
            return None
        kind: CodeKind = "float" if self.codes.is_floating_point() else "int"
        return Scheme(self.bits, self.zero is None, None if size == width else size, kind, whole)

    @property
    def learnable(self) -> bool:
        """Whether codes are integers, and mean even steps of a scale that belongs to a stretch of a row."""
        even = self.levels is None and self.offset is None and not self.codes.is_floating_point()
        return even and not isinstance(self.block, int) and self.block[0] == 1


@dataclass(frozen=True)
class Sparse:
    """A form of which only some weights are stored; the others are zero."""

    mask: Tensor  # bool [out, in], true where a weight is kept
    values: Form  # of a matrix of that shape; what it says of the others is not stored
    kept: int  # how many weights are
    pattern: tuple[int, int] | None = None  # (n, m): n weights of each m adjacent inputs are kept; None: any


@dataclass(frozen=True)
class Codebook:
    """Codes into tables of values, which stretches of rows have in common."""

    codes: Tensor  # uint8 [out, in], below 2^bits
    table: Tensor  # [groups, 2^bits], as stored; the first out / groups rows share the first table
    bits: int

    def values(self) -> Tensor:
        """What the codes mean, float32 [out, in]."""
        groups, entries = self.table.shape
        values = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        codes, found, table = (x.view(groups, -1) for x in (self.codes, values, self.table.float()))
        size = max(1, LOOKED_UP // codes.shape[1])
        for start in range(0, groups, size):  # an index is four times as large as a code
            part = slice(start, start + size)
            first = torch.arange(0, len(codes[part]) * entries, entries, dtype=torch.int32, device=codes.device)
            index = (codes[part].int() + first[:, None]).flatten()
            torch.index_select(table[part].flatten(), 0, index, out=found[part].view(-1))
        return values


@dataclass(frozen=True)
class LowRank:
    """A product of two factors.

    Any matrix of rank r has r rows of which all others are sums: where `pivots` name them, `right` is these rows, and
    `left` makes the others of them, so that r^2 numbers fewer are stored (PIFA, Zhao et al. 2025, arXiv 2501.19090).

    Matrices that are one product when they are stacked share `right`, of which each has some rows as its own.
    """

    left: Form  # [out, r], or [out - p, r] beside p pivots, whose rows follow each other without these
    right: Form  # [r, in]
    pivots: Tensor | None = None  # bool [out], true for p rows: r, or fewer where others share `right`
    first: int = 0  # row of `right` from which on they are the pivots' rows
    shared: str | None = None  # name of the matrix beside which `right` is stored; None: nobody shares it

    @property
    def own(self) -> slice:
        """The rows of `right` that are the pivots' rows."""
        count = 0 if self.pivots is None else len(self.pivots) - _rows(self.left)
        return slice(self.first, self.first + count)


@dataclass(frozen=True)
class Sum:
    """Forms of one shape, added up."""

    parts: tuple[Form, ...]


Form = Dense | Quantized | Sparse | Codebook | LowRank | Sum


def _rows(factor: Form) -> int:
    """Of floats, or of codes."""
    return len(factor.codes if isinstance(factor, Quantized | Codebook) else getattr(factor, "weight"))  # noqa: B009


@dataclass(frozen=True)
class Scheme:
    """How codes that mean multiples of a scale are to be read, and what becomes of the inputs they multiply."""

    bits: int
    symmetric: bool
    group_size: int | None  # adjacent inputs that share a scale; None: one scale per output
    kind: CodeKind = "int"
    whole: bool = False  # one scale for the whole matrix
    inputs: tuple[InputKind, Literal["dynamic", "static"]] | None = None  # None: not rounded
