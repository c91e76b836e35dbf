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
    """Codes into tables, which stretches of rows have in common; each names a value, or those of adjacent inputs."""

    codes: Tensor  # uint8 [out, in / dim], below 2^bits
    table: Tensor  # [groups, 2^bits, dim], as stored; the first out / groups rows share the first table
    bits: int  # of a code
    scale: Tensor | None = None  # [out], as stored: what the values of a row are multiples of; None: of 1

    @property
    def dim(self) -> int:
        """How many adjacent inputs have one code."""
        return self.table.shape[2]

    @property
    def shape(self) -> torch.Size:
        """Of the matrix: [out, in]."""
        return torch.Size((len(self.codes), self.codes.shape[1] * self.dim))

    def values(self) -> Tensor:
        """What the codes mean, float32 [out, in]."""
        groups, entries, dim = self.table.shape
        values = torch.empty(self.shape, dtype=torch.float32, device=self.codes.device)
        table, found = self.table.float().view(-1, dim), values.view(-1, dim)
        out, width = self.codes.shape
        first = torch.arange(groups, dtype=torch.int32, device=table.device).mul_(entries)
        first = first.repeat_interleave(out // groups)[:, None]
        size = max(1, LOOKED_UP // width)
        for start in range(0, out, size):  # an index is four times as large as a code
            stop = min(start + size, out)
            index = (self.codes[start:stop] + first[start:stop]).flatten()
            torch.index_select(table, 0, index, out=found[start * width : stop * width])
        return values if self.scale is None else values.mul_(self.scale.float()[:, None])


@dataclass(frozen=True)
class Scattered:
    """Single weights of a matrix; all others are zero."""

    values: Tensor  # [n], any float dtype, those of one row after those of the row before
    columns: Tensor  # int [n], their inputs, rising within a row
    counts: Tensor  # int [out], how many of each row there are
    width: int  # inputs of the matrix

    @property
    def shape(self) -> torch.Size:
        """Of the matrix: [out, in]."""
        return torch.Size((len(self.counts), self.width))

    def weight(self) -> Tensor:
        """The matrix, float32 [out, in]."""
        weight = torch.zeros(self.shape, device=self.values.device)
        if self.values.is_meta:
            return weight
        rows = torch.arange(len(self.counts), device=weight.device).repeat_interleave(self.counts.long())
        weight[rows, self.columns.long()] = self.values.float()
        return weight


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


Form = Dense | Quantized | Sparse | Codebook | Scattered | LowRank | Sum


def _rows(factor: Form) -> int:
    """Of floats, or of codes."""
    if isinstance(factor, Dense):
        return len(factor.weight)
    assert isinstance(factor, Quantized | Codebook)
    return len(factor.codes)


@dataclass(frozen=True)
class Scheme:
    """How codes that mean multiples of a scale are to be read, and what becomes of the inputs they multiply."""

    bits: int
    symmetric: bool
    group_size: int | None  # adjacent inputs that share a scale; None: one scale per output
    kind: CodeKind = "int"
    whole: bool = False  # one scale for the whole matrix
    inputs: tuple[InputKind, Literal["dynamic", "static"]] | None = None  # None: not rounded
