"""Round to nearest: every weight goes to the nearest point of its group's grid; no calibration data is needed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from llmshrink.forms import Layer
from llmshrink.methods.base import Method, Prepared, Task
from llmshrink.methods.grid import BlockConfig, choose_grid, round_to
from llmshrink.statistics import NoStatistic


class RtnConfig(BlockConfig):
    """Settings of round-to-nearest."""


class Rtn(Method[RtnConfig]):
    """Round to nearest on an even grid, scales from the range or searched for the least squared error."""

    task: ClassVar[Task] = "quantize"
    needs = NoStatistic
    by_row = True
    baseline = None
    Config = RtnConfig

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be compressed, or None."""
        return self.config.why_not(shape)

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Quantize one matrix [out, in]."""
        matrix = weight.float()
        grid = choose_grid(matrix, self.config, self.scales or weight.dtype)
        return Layer(grid.form(round_to(grid, matrix, self.config), self.config))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return self.config.meta(shape, self.scales or dtype)


METHOD = Rtn
