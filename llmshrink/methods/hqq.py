"""Half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/): robust grids without data.

A rest r of rounding is split into an outlier e and what is left of it, and e costs less than a square would:

    min over s, z, e of  sum |e|^p + beta / 2 (r - e)^2,    r = (w - s (c - z)) / u,  p < 1

in turns: c is the nearest code, e comes from a shrinkage operator, s and z from a regression of what outliers leave.
Three differences to its library, which fixes s, stores z in float16 and has no unit. Here r is counted in u, the
scale that the group began with: in weights, which are small, beta = 10 makes every e zero. Both s and z are fitted, and
z is an integer, as loaders of plain checkpoints read it, in a quarter of the bytes. And beta stays as it is, so that a
step either lowers the sum or is not taken.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Layer, Objective
from llmshrink.methods.base import Method, Prepared, Task
from llmshrink.methods.even import CHUNK, stored
from llmshrink.methods.grid import Grid, GridConfig, choose_grid, round_to
from llmshrink.statistics import NoStatistic

ROUNDS = 10  # of codes, outliers, scales


class HqqConfig(GridConfig):
    """Settings of half-quadratic quantization; `scales` says where it begins."""

    symmetric: bool = Field(False, description="zero is the code 0; false stores a zero point for every scale")
    norm: float = Field(0.7, gt=0, le=1, description="p of what an outlier costs: |e|^p")
    beta: float = Field(
        1.0, gt=0, description="how tight rests are held; those within beta^(-1 / (2 - p)) steps are no outliers"
    )


class Hqq(Method[HqqConfig]):
    """Scales and zero points that bend less to single weights than those of the least squared error."""

    task: ClassVar[Task] = "quantize"
    needs = NoStatistic
    by_row = True
    baseline = None
    Config = HqqConfig

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be compressed, or None."""
        return self.config.why_not(shape)

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Quantize one matrix [out, in]; its objective is the sum above, the baseline's that of `rtn`."""
        matrix, dtype = weight.float(), self.scales or weight.dtype
        parts = [self._fit(rows, dtype) for rows in torch.split(matrix, max(1, CHUNK // matrix.shape[1]))]
        zeros = [grid.zero for grid, _, _ in parts if grid.zero is not None]
        grid = Grid(torch.cat([grid.scale for grid, _, _ in parts]), torch.cat(zeros) if zeros else None)
        own = torch.cat([least.sum(1) for _, least, _ in parts])
        start = torch.cat([first.sum(1) for _, _, first in parts])
        return Layer(grid.form(round_to(grid, matrix, self.config), self.config), Objective(own, start))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return self.config.meta(shape, self.scales or dtype)

    def _fit(self, w: Tensor, dtype: torch.dtype) -> tuple[Grid, Tensor, Tensor]:
        """The best grid for rows [rows, in], the sum above of each group, and that of the grid it began with."""
        grid = best = choose_grid(w, self.config, dtype)
        unit = grid.scale.float().abs()[..., None]
        steps, outliers, cost = self._judge(w, grid, unit)
        least = start = cost
        for _ in range(ROUNDS):
            grid = self._refit(grid, steps, w.view(steps.shape) - unit * outliers, dtype)
            steps, outliers, cost = self._judge(w, grid, unit)
            better = cost < least
            least = torch.minimum(cost, least)
            zero = None
            if grid.zero is not None and best.zero is not None:
                zero = torch.where(better, grid.zero, best.zero)
            best = Grid(torch.where(better, grid.scale, best.scale), zero)
        return best, least, start

    def _judge(self, w: Tensor, grid: Grid, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Steps and outliers [rows, groups, group] of a grid, and the sum above [rows, groups].

        Outliers come from a generalized soft threshold, the blog's shrinkage operator.
        """
        p, beta = self.config.norm, self.config.beta
        steps = round_to(grid, w, self.config)
        shape = (*grid.scale.shape, -1)
        rest = (w - grid.decode(steps)).view(shape) / unit
        far = rest.abs() > beta ** (-1 / (2 - p))
        size = rest[far].abs()  # few: powers of all would take most of the time
        size -= size.pow(p - 1) / beta
        outliers = torch.zeros_like(rest)
        outliers[far] = rest[far].sign() * size
        cost = (rest - outliers).square_().mul_(beta / 2)
        cost[far] += size.pow(p)
        return steps.view(shape), outliers, cost.sum(2)

    def _refit(self, grid: Grid, steps: Tensor, target: Tensor, dtype: torch.dtype) -> Grid:
        """Scales and zero points from a regression of `target` on the codes."""
        zero = None
        if grid.zero is not None:
            codes = steps + grid.zero[..., None]
            middle, mean = codes.mean(2), target.mean(2)
            away = codes - middle[..., None]
            slope = (away * target).sum(2) / away.square().sum(2)
            zero = (middle - mean / slope).nan_to_num_().round_().clamp_(*self.config.code_range)
            steps = codes - zero[..., None]
            zero = zero.to(torch.int8)
        scale = (steps * target).sum(2) / steps.square().sum(2)
        return Grid(stored(scale, dtype).to(dtype), zero)


METHOD = Hqq
