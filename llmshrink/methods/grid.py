"""Even integer grids: which scales, zero points and minima a group of weights gets, and the codes under them.

A group of weights w is stored as integer codes c in [-2^(bits-1), 2^(bits-1) - 1] and means s * (c - z). The signed
range has one more code below zero than above it, so for symmetric grids (z = 0) the SIGN of s is a free choice: a
negative scale flips the range, at no bytes. In GGUF's block types it means s * c - m, and s and m may be stored as
integers of one float16 for several groups (`blocks.py` searches those).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmshrink.block_types import BLOCK_TYPES, BlockName, BlockType
from llmshrink.forms import Dense, Form, Layer, Quantized
from llmshrink.methods import blocks, even
from llmshrink.methods.base import GroupConfig

Table = Literal["scale", "minimum"]


class GridConfig(GroupConfig):
    """Settings shared by the methods that store codes on an even grid."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight")
    symmetric: bool = Field(True, description="zero is the code 0; false stores a zero point for every scale")
    scales: Literal["minmax", "mse"] = Field("mse", description="cover the range, or search for the least error")

    @property
    def block(self) -> BlockType | None:
        """What a block type of GGUF stores, where one is named."""
        return None

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code, both included."""
        if self.block is not None:
            return self.block.code_range
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def group(self, width: int) -> int:
        """The number of adjacent inputs that share a scale in a matrix of this width."""
        return super().group(width) if self.block is None else self.block.group

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be cut into these groups, or None."""
        if self.block is None:
            return super().why_not(shape)
        if shape[1] % self.block.size:
            return f"it is stored in blocks of {self.block.size}, which does not divide the width {shape[1]}"
        return None

    def meta(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """A result of the right shapes and dtypes on the `meta` device."""
        out, width = shape
        groups = width // self.group(width)
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        if self.block is not None:
            table = torch.empty(out, groups, device="meta")
            unit = None if self.block.nested is None else table[:, : width // self.block.size]
            low, low_unit = (table, unit) if self.block.minimum else (None, None)
            return Layer(BlockGrid(table, None, low, unit, low_unit, kind=self.block).form(codes, self))
        grid = Grid(
            scale=torch.empty(out, groups, dtype=dtype, device="meta"),
            zero=None if self.symmetric else torch.empty(out, groups, dtype=torch.int8, device="meta"),
        )
        return Layer(grid.form(codes, self))


class BlockConfig(GridConfig):
    """Settings of the methods that can also store the block types of GGUF."""

    type: BlockName | None = Field(
        None, description="block type of GGUF, which says the bits, the group and what is stored of it; null: none"
    )

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        said = ("bits", "group_size", "symmetric", "scales")
        given = [name for name in said if getattr(self, name) != type(self).model_fields[name].default]
        if self.type is not None and given:
            raise ValueError(f"{', '.join(given)}: the type {self.type} says it already; leave out one or the other")
        return self

    @property
    def block(self) -> BlockType | None:
        """What the block type stores, where one is named."""
        return None if self.type is None else BLOCK_TYPES[self.type]


@dataclass(frozen=True)
class Grid:
    """The tables of one matrix [out, in]. Below, `steps` are codes less their zero point, as floats [out, in]."""

    scale: Tensor  # [out, in / group], in the dtype it is stored in; never zero, may be negative
    zero: Tensor | None  # int8 [out, in / group], in the range of the codes; None: symmetric
    minimum: Tensor | None = None  # [out, in / group], subtracted; None: nothing is

    def tables(self, config: GridConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, minimum, lowest and highest step of each group: float32 [out, in / group], no scale zero."""
        low, high = config.code_range
        scale = self.scale.float()
        nothing = torch.zeros_like(scale)
        zero = nothing if self.zero is None else self.zero.float()
        return scale, nothing, low - zero, high - zero

    def decode(self, steps: Tensor) -> Tensor:
        """The weights that `steps` mean: float32 [out, in]."""
        return (steps.view(*self.scale.shape, -1) * self.scale.float()[..., None]).view(steps.shape)

    def storable(self, table: Table, values: Tensor, number: int) -> Tensor:
        """The values of a table nearest to `values` float32 [out] that can be stored for the group of this number."""
        return even.stored(values, self.scale.dtype)

    def under(self, scale: Tensor, minimum: Tensor) -> Self:
        """The same grid under other scales and minima [out, in / group], which can be stored."""
        return replace(self, scale=scale.to(self.scale.dtype))

    def where(self, rows: Tensor, other: Self) -> Self:
        """This grid in the rows [out, 1] that are true, the other one elsewhere."""
        names = [each.name for each in fields(self) if isinstance(getattr(self, each.name), Tensor)]
        return replace(self, **{name: torch.where(rows, getattr(self, name), getattr(other, name)) for name in names})

    def form(self, steps: Tensor, config: GridConfig) -> Quantized:
        """The stored form of `steps` under these tables."""
        codes = steps.to(torch.int8)
        if self.zero is not None:
            codes = (codes.view(*self.scale.shape, -1) + self.zero[..., None]).view(codes.shape)
        block = (1, config.group(codes.shape[1]))
        return Quantized(codes, Dense(self.scale), self.zero, None, block, config.bits)


@dataclass(frozen=True)
class BlockGrid(Grid):
    """The tables of a matrix in a block type of GGUF, as they decode: float32. Where a scale is zero, steps are too."""

    scale_unit: Tensor | None = None  # float32 [out, in / size], of which the scales are multiples; None: float16
    minimum_unit: Tensor | None = None
    kind: BlockType = field(kw_only=True)

    def tables(self, config: GridConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, minimum, lowest and highest step of each group; a scale of zero is one, with no step but zero."""
        used = self.scale != 0
        low, high = (used * float(code) for code in self.kind.code_range)
        minimum = torch.zeros_like(self.scale) if self.minimum is None else self.minimum
        return self.scale.masked_fill(~used, 1), minimum, low, high

    def decode(self, steps: Tensor) -> Tensor:
        """The weights that `steps` mean: float32 [out, in]."""
        values = super().decode(steps)
        if self.minimum is not None:
            values.view(*self.scale.shape, -1).sub_(self.minimum[..., None])
        return values

    def storable(self, table: Table, values: Tensor, number: int) -> Tensor:
        """The nearest multiples of the blocks' unit, or the nearest float16, but no scale of zero."""
        unit = self.scale_unit if table == "scale" else self.minimum_unit
        if unit is None:
            return even.stored(values, torch.float16) if table == "scale" else values.half().float()
        one = unit[:, number * self.kind.group // self.kind.size]
        integers = (values / one).nan_to_num_(0).round_().clamp_(*self.kind.scale_range)
        nearest = integers * one
        return nearest if table == "minimum" else torch.where(integers == 0, self.scale[:, number], nearest)

    def under(self, scale: Tensor, minimum: Tensor) -> Self:
        """The same grid under other scales and minima, which can be stored; scales that were zero stay so."""
        other = None if self.minimum is None else minimum
        return replace(self, scale=scale.masked_fill(self.scale == 0, 0), minimum=other)

    def form(self, steps: Tensor, config: GridConfig) -> Quantized:
        """The stored form of `steps` under these tables."""
        kind = self.kind
        integers = torch.uint8 if kind.minimum else torch.int8

        def table(values: Tensor, unit: Tensor | None) -> Form:
            if unit is None or kind.nested is None:
                return Dense(values.half())
            per = kind.size // kind.group
            codes = (values / unit.repeat_interleave(per, 1)).nan_to_num_(0).round_().to(integers)
            return Quantized(codes, Dense(unit.half()), None, None, (1, per), kind.nested)

        return Quantized(
            codes=steps.to(integers) if kind.levels is None else steps.add(1).to(torch.uint8),
            scale=table(self.scale, self.scale_unit),
            zero=None,
            levels=None
            if kind.levels is None
            else torch.tensor(kind.levels, device="cpu" if steps.is_meta else steps.device),
            block=(1, kind.group),
            bits=kind.bits,
            minimum=None if self.minimum is None else table(self.minimum, self.minimum_unit),
        )


def round_to(grid: Grid, weight: Tensor, config: GridConfig) -> Tensor:
    """The steps [out, in] nearest to a float32 matrix."""
    scale, minimum, lowest, highest = (table[..., None] for table in grid.tables(config))
    steps = (weight.view(*grid.scale.shape, -1) + minimum).div_(scale)
    return steps.round_().clamp_(lowest, highest).view(weight.shape)


def choose_grid(weight: Tensor, config: GridConfig, dtype: torch.dtype, importance: Tensor | None = None) -> Grid:
    """Scales and zero points for a float32 matrix [out, in].

    Args:
        weight: float32 [out, in].
        config: bits, groups, symmetry, and whether to search.
        dtype: what the scales are stored in; they are rounded to it before the codes are chosen.
        importance: float32 [in], positive weights of the squared errors of each input; None: all equal.
    """
    if config.block is not None:
        found = blocks.search(weight, config.block, importance)
        return BlockGrid(found.scale, None, found.minimum, found.scale_unit, found.minimum_unit, kind=config.block)
    return Grid(*even.search(weight, config, dtype, importance))
