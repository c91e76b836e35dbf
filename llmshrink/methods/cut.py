"""What a surgery left of a matrix, as it is: the reader has taken it out already, and a repair may fit it afterwards.

No recipe names it as a method: `cut` says what is kept.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from llmshrink.forms import Dense, Layer
from llmshrink.methods.base import Method, MethodConfig, Prepared, Task
from llmshrink.statistics import NoStatistic


class CutConfig(MethodConfig):
    """Nothing is to be set for a single matrix."""


class Cut(Method[CutConfig]):
    """One matrix of the smaller model."""

    task: ClassVar[Task] = "prune"
    needs = NoStatistic
    Config = CutConfig

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """The matrix [out, in] itself."""
        return Layer(Dense(weight))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return Layer(Dense(torch.empty(shape, dtype=dtype, device="meta")))
