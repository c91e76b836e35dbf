"""Cast: every weight to the nearest float of 16 or 32 bits."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Dense, Event, Layer
from llmshrink.methods.base import Method, MethodConfig, Prepared, Task
from llmshrink.statistics import NoStatistic


class CastConfig(MethodConfig):
    """Settings of the cast."""

    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="what the weights are stored in")


class Cast(Method[CastConfig]):
    """Plain floats; what is too large for float16 becomes its largest number, and is told."""

    task: ClassVar[Task] = "quantize"
    needs = NoStatistic
    by_row = True
    baseline = None
    learnable = False  # it is as near as its dtype allows
    Config = CastConfig

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        found: torch.dtype = getattr(torch, self.config.dtype)
        return found

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Cast one matrix [out, in]."""
        limit, exact = torch.finfo(self.dtype).max, weight.float()
        outside = int((exact.abs() > limit).sum())
        if not outside:
            return Layer(Dense(weight.to(self.dtype, copy=True, memory_format=torch.contiguous_format)))
        message = f"{outside} weights beyond {limit:g}, the largest number of {self.config.dtype}, were cut to it"
        event = Event("overflow", message, data={"weights": float(outside)})
        return Layer(Dense(exact.clamp(-limit, limit).to(self.dtype)), events=(event,))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return Layer(Dense(torch.empty(shape, dtype=self.dtype, device="meta")))


METHOD = Cast
