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
from llmshrink.methods.base import GroupConfig

CHUNK = 1 << 17  # weights searched at a time: the temporaries stay in the processor's cache
STEPS = 5  # scales tried per group, each with both signs
REFITS = 2  # closed-form steps after the search
TIGHTEST = {
    2: 0.45,
    3: 0.5,
    4: 0.6,
    8: 1.0,
}  # by bits: the smallest scale tried, as a share of the one that covers all


class GridConfig(GroupConfig):
    """Settings shared by the methods that store codes on an even grid."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight")
    symmetric: bool = Field(True, description="zero is the code 0; false stores a zero point for every scale")
    scales: Literal["minmax", "mse"] = Field("mse", description="cover the range, or search for the least error")

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code, both included."""
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

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
    """The tables of one matrix [out, in]. Below, `steps` are codes less their zero point, as floats [out, in]."""

    scale: Tensor  # [out, in / group], in the dtype it is stored in; never zero, may be negative
    zero: Tensor | None  # int8 [out, in / group], in the range of the codes; None: symmetric

    def limits(self, config: GridConfig) -> tuple[Tensor, Tensor]:
        """Lowest and highest step of each group: float32 [out, in / group]."""
        low, high = config.code_range
        zero = self.scale.new_zeros(1, dtype=torch.float32) if self.zero is None else self.zero.float()
        return (low - zero).expand(self.scale.shape), (high - zero).expand(self.scale.shape)

    def decode(self, steps: Tensor) -> Tensor:
        """The weights that `steps` mean: float32 [out, in]."""
        return (steps.view(*self.scale.shape, -1) * self.scale.float()[..., None]).view(steps.shape)

    def form(self, steps: Tensor, config: GridConfig) -> Quantized:
        """The stored form of `steps` under these tables."""
        codes = steps.to(torch.int8)
        if self.zero is not None:
            codes = (codes.view(*self.scale.shape, -1) + self.zero[..., None]).view(codes.shape)
        block = (1, config.group(codes.shape[1]))
        return Quantized(codes, Dense(self.scale), self.zero, None, block, config.bits)


def round_to(grid: Grid, weight: Tensor, config: GridConfig) -> Tensor:
    """The steps [out, in] nearest to a float32 matrix."""
    grouped = weight.view(*grid.scale.shape, -1)
    zero = None if grid.zero is None else grid.zero.float()
    return _nearest(grouped, grid.scale.float(), zero, config).view(weight.shape)


def choose_grid(weight: Tensor, config: GridConfig, dtype: torch.dtype, importance: Tensor | None = None) -> Grid:
    """Scales and zero points for a float32 matrix [out, in].

    Args:
        weight: float32 [out, in].
        config: bits, groups, symmetry, and whether to search.
        dtype: what the scales are stored in; they are rounded to it before the codes are chosen.
        importance: float32 [in], positive weights of the squared errors of each input; None: all equal.
    """
    out, width = weight.shape
    group = config.group(width)
    # By a power of two, which changes no digit: squares of the importance must neither overflow nor vanish.
    cost = weight.new_ones(width) if importance is None else importance.ldexp(-importance.mean().frexp().exponent)
    parts = [
        _choose(rows.reshape(len(rows), -1, group), cost.view(-1, group), config, dtype)
        for rows in torch.split(weight, max(1, CHUNK // width))
    ]
    zeros = [zero for _, zero in parts if zero is not None]
    return Grid(torch.cat([scale for scale, _ in parts]).to(dtype), torch.cat(zeros).to(torch.int8) if zeros else None)


def _choose(w: Tensor, cost: Tensor, config: GridConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point [rows, groups] of `w` [rows, groups, group] under the costs [groups, group].

    For fixed steps c the best scale is s = <w, c> / <c, c> (weighted), and it takes <w, c>^2 / <c, c> off the error:
    so every scale tried stands for its steps, and these are judged by the best scale that they could have.
    """
    if config.scales == "minmax":
        scale, zero = _covering(w, config)
        return stored(scale, dtype), zero
    weighted = w * cost
    most = w.new_full(w.shape[:2], -1)
    best, best_zero = torch.ones_like(most), None if config.symmetric else torch.zeros_like(most)
    for steps, sign, zero in _candidates(w, config):
        along, square = _moments(steps, weighted, cost)
        gain = along.square() / square
        better = gain > most
        most, best = torch.where(better, gain, most), torch.where(better, along.mul_(sign) / square, best)
        best_zero = zero if zero is None or best_zero is None else torch.where(better, zero, best_zero)
    best = stored(best, dtype)
    steps = _nearest(w, best, best_zero, config)
    error = _error(w, steps, best, cost)
    for _ in range(REFITS):
        along, square = _moments(steps, weighted, cost)
        scale = stored(along / square, dtype)
        steps = _nearest(w, scale, best_zero, config)
        again = _error(w, steps, scale, cost)
        best, error = torch.where(again < error, scale, best), torch.minimum(again, error)
    return best, best_zero


def _covering(w: Tensor, config: GridConfig) -> tuple[Tensor, Tensor | None]:
    """The scale and zero point [rows, groups] that just cover the range of each group, and zero."""
    low, high = config.code_range
    least, most = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
    if config.symmetric:
        return torch.maximum(most, -least) / ((high - low) / 2), None
    scale = (most - least) / (high - low)
    return scale, (low - least / scale).nan_to_num_().round_().clamp_(low, high)


def _candidates(w: Tensor, config: GridConfig) -> Iterator[tuple[Tensor, float, Tensor | None]]:
    """Steps [rows, groups, group] worth trying, the sign that their scale gets, and their zero points.

    Steps and the same steps with the other sign take the same off the error, so these need not be turned round.
    """
    low, high = config.code_range
    least, most = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
    tightest = TIGHTEST[config.bits]
    if config.symmetric:
        reach = torch.maximum(most, -least)[..., None]
        for factor in torch.linspace(tightest / -low, 1 / high, STEPS).tolist():
            steps = (w / (factor * reach)).round_()
            yield steps.clamp(low, high), 1.0, None
            yield steps.clamp_(-high, -low), -1.0, None
        return
    for factor in torch.linspace(1, tightest, STEPS if tightest < 1 else 1).tolist():
        scale = factor * (most - least) / (high - low)
        middle = (low - factor * least / scale).nan_to_num_()
        for shift in (0, -1, 1):
            zero = (middle + shift).round_().clamp_(low, high)
            yield _nearest(w, scale, zero, config), 1.0, zero


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as a reader finds them, in float32: rounded to `dtype`, and one where that is no usable number."""
    rounded = scale.to(dtype).float()
    usable = rounded.isfinite() & (rounded.abs() >= torch.finfo(dtype).tiny)
    return torch.where(usable, rounded, 1.0)


def _nearest(w: Tensor, scale: Tensor, zero: Tensor | None, config: GridConfig) -> Tensor:
    """The steps nearest to `w` [rows, groups, group]."""
    low, high = config.code_range
    steps = w / scale[..., None]
    if zero is None:
        return steps.round_().clamp_(low, high)
    return steps.round_().clamp_((low - zero)[..., None], (high - zero)[..., None])


def _moments(steps: Tensor, weighted: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted <w, c> and <c, c> of each group."""
    return torch.linalg.vecdot(steps, weighted), steps.square().mul_(cost).sum(2)


def _error(w: Tensor, steps: Tensor, scale: Tensor, cost: Tensor) -> Tensor:
    """Weighted squared error of each group."""
    return torch.addcmul(w, steps, scale[..., None], value=-1).square_().mul_(cost).sum(2)
