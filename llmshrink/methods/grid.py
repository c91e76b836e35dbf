"""Even integer grids: which scales and zero points a group of weights gets, and the codes under them.

A group of weights w is stored as integer codes c in [-2^(bits-1), 2^(bits-1) - 1] and means s * (c - z). The signed
range has one more code below zero than above it, so for symmetric grids (z = 0) the SIGN of s is a free choice: a
negative scale flips the range, at no bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Dense, Layer, Quantized
from llmshrink.methods.base import MethodConfig

CHUNK = 1 << 16  # weights searched at a time: the temporaries stay in the processor's cache
STEPS = 24  # scales tried per group before the closed-form steps
REFITS = 3  # closed-form steps after the search


class GridConfig(MethodConfig):
    """Settings shared by the methods that store codes on an even grid."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight")
    group_size: int | None = Field(
        None, description="adjacent inputs that share a scale; -1: one scale per output; null: resolved by the plan"
    )
    symmetric: bool = Field(True, description="zero is the code 0; false stores a zero point for every scale")
    scales: Literal["minmax", "mse"] = Field("mse", description="cover the range, or search for the least error")

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code, both included."""
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def group(self, width: int) -> int:
        """The number of adjacent inputs that share a scale in a matrix of this width."""
        if self.group_size is None:
            raise ValueError("group_size is null: the plan resolves it to a number before anything is compressed")
        return width if self.group_size == -1 else self.group_size

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be cut into these groups, or None."""
        if self.group_size is None or self.group_size == -1:
            return None
        if self.group_size < 1:
            return f"group_size {self.group_size} is neither -1 (one group per row) nor a positive number"
        if shape[1] % self.group_size:
            return f"group_size {self.group_size} does not divide the width {shape[1]}"
        return None

    def meta(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """A result of the right shapes and dtypes on the `meta` device."""
        out, width = shape
        groups = width // self.group(width)
        table = Grid(
            scale=torch.empty(out, groups, dtype=dtype, device="meta"),
            zero=None if self.symmetric else torch.empty(out, groups, dtype=torch.int8, device="meta"),
        )
        return Layer(table.form(torch.empty(shape, dtype=torch.int8, device="meta"), self))


@dataclass(frozen=True)
class Grid:
    """The tables of one matrix [out, in]."""

    scale: Tensor  # [out, in / group], in the dtype it is stored in; never zero, may be negative
    zero: Tensor | None  # int8 [out, in / group], in the range of the codes; None: symmetric

    def columns(self, group: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of every weight: float32 [out, in]."""
        zero = None if self.zero is None else self.zero.float().repeat_interleave(group, 1)
        return self.scale.float().repeat_interleave(group, 1), zero

    def form(self, codes: Tensor, config: GridConfig) -> Quantized:
        """The stored form of int8 `codes` [out, in] under these tables."""
        block = (1, config.group(codes.shape[1]))
        return Quantized(codes, Dense(self.scale), self.zero, None, block, config.bits)


def encode(weight: Tensor, grid: Grid, config: GridConfig) -> Tensor:
    """The nearest codes, int8 [out, in], of a float32 matrix under the given tables."""
    out, width = weight.shape
    grouped = weight.view(out, -1, config.group(width))
    codes = _nearest(grouped, grid.scale.float()[..., None], _wide(grid.zero), config.code_range)
    return codes.to(torch.int8).view(out, width)


def choose_grid(weight: Tensor, config: GridConfig, dtype: torch.dtype, importance: Tensor | None = None) -> Grid:
    """Scales and zero points for a float32 matrix [out, in].

    Args:
        weight: float32 [out, in].
        config: bits, groups, symmetry, and whether to search.
        dtype: what the scales are stored in; they are rounded to it before any error is measured.
        importance: float32 [in], non-negative weights of the squared errors of each input; None: all equal.
    """
    out, width = weight.shape
    group = config.group(width)
    flat = weight.reshape(-1, group)
    cost = torch.ones(1, group) if importance is None else importance.view(-1, group)
    cost = cost.to(weight.device)
    chunk = max(1, CHUNK // group)
    parts = []
    for start in range(0, flat.shape[0], chunk):
        rows = torch.arange(start, min(start + chunk, flat.shape[0]), device=weight.device)
        parts.append(_choose(flat[start : start + chunk], cost[rows % cost.shape[0]], config, dtype))
    scale = torch.cat([s for s, _ in parts]).view(out, -1)
    zeros = [z for _, z in parts if z is not None]
    return Grid(scale.to(dtype), torch.cat(zeros).view(out, -1).to(torch.int8) if zeros else None)


def _choose(w: Tensor, cost: Tensor, config: GridConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point [n] of each row of `w` [n, group] under the costs [n, group]."""
    low, high = config.code_range
    best, best_zero, least = None, None, None
    for scale, zero in _candidates(w, config):
        stored = _stored(scale, dtype)
        error = _error(w, cost, stored, zero, config)
        if least is None or best is None:
            best, best_zero, least = stored, zero, error
        else:
            better = error < least
            best, least = torch.where(better, stored, best), torch.where(better, error, least)
            best_zero = None if zero is None or best_zero is None else torch.where(better, zero, best_zero)
    assert best is not None and least is not None
    for _ in range(REFITS if config.scales == "mse" else 0):
        # For fixed codes c the best scale is <w, c> / <c, c> (weighted); new codes under it can only be nearer still.
        codes = _nearest(w, best[:, None], _wide(best_zero), (low, high))
        codes = codes if best_zero is None else codes - best_zero[:, None]
        weighted = codes * cost
        refit = _stored((weighted * w).sum(1) / (weighted * codes).sum(1), dtype)
        error = _error(w, cost, refit, best_zero, config)
        better = error < least
        best, least = torch.where(better, refit, best), torch.where(better, error, least)
    return best, best_zero


def _candidates(w: Tensor, config: GridConfig) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales [n] and zero points [n] worth trying for each row of `w` [n, group]."""
    low, high = config.code_range
    least, most = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    if not config.symmetric:
        shrink = [1.0] if config.scales == "minmax" else torch.linspace(1, 0.4, STEPS).tolist()
        for factor in shrink:
            scale = factor * (most - least) / (high - low)
            middle = low - factor * least / torch.where(scale == 0, 1, scale)
            for shift in (0,) if config.scales == "minmax" else (-1, 0, 1):
                yield scale, (middle + shift).round().clamp(low, high)
        return
    reach = torch.maximum(most, -least)
    if config.scales == "minmax":
        yield reach / ((high - low) / 2), None
        return
    # From clipping well inside the range up to the scale at which neither end clips.
    for factor in torch.linspace(0.4 if config.bits < 8 else 0.9, -low / high, STEPS).tolist():
        yield factor * reach / -low, None
        yield factor * reach / low, None


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as a reader finds them, in float32: rounded to `dtype`, one where a group is all zero."""
    rounded = scale.to(dtype).float()
    usable = rounded.isfinite() & (rounded.abs() >= torch.finfo(dtype).tiny)
    return torch.where(usable, rounded, torch.ones_like(rounded))


def _nearest(w: Tensor, scale: Tensor, zero: Tensor | None, code_range: tuple[int, int]) -> Tensor:
    """Codes nearest to `w`, as floats; scale and zero broadcast."""
    codes = w / scale
    if zero is not None:
        codes = codes.add_(zero)
    return codes.round_().clamp_(*code_range)


def _error(w: Tensor, cost: Tensor, scale: Tensor, zero: Tensor | None, config: GridConfig) -> Tensor:
    """Weighted squared error [n] of the rows of `w` [n, group] rounded to nearest."""
    codes = _nearest(w, scale[:, None], _wide(zero), config.code_range)
    if zero is not None:
        codes = codes.sub_(zero[:, None])
    rest = torch.addcmul(w, codes, scale[:, None], value=-1)
    return rest.square_().mul_(cost).sum(1)


def _wide(zero: Tensor | None) -> Tensor | None:
    return None if zero is None else zero.float()[..., None]
