"""What training left of a matrix, as it is.

No recipe names it as a method: the stages that train do.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from llmshrink.forms import Dense, Layer
from llmshrink.methods.base import Method, MethodConfig, Prepared, Task
from llmshrink.statistics import NoStatistic


class TrainedConfig(MethodConfig):
    """Nothing is to be set for a single matrix."""


class Trained(Method[TrainedConfig]):
    """One matrix of a model that was trained as a whole."""

    task: ClassVar[Task] = "distill"
    needs = NoStatistic
    Config = TrainedConfig

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """The matrix [out, in] itself."""
        return Layer(Dense(weight))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return Layer(Dense(torch.empty(shape, dtype=dtype, device="meta")))
