"""LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): 8-bit weights with one scale per output, by bitsandbytes.

Each row of the matrix is divided by its largest magnitude. While the model runs, bitsandbytes rounds the inputs of each
token to 8 bits too, but for features that reach a threshold: in large models a few carry most of what is computed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Dense, Event, InputScheme, Layer, Quantized
from llmshrink.methods.base import Method, MethodConfig, Prepared, Task
from llmshrink.statistics import NoStatistic

BITS = 8
LARGEST = 127  # code of the largest magnitude of a row


class Int8Config(MethodConfig):
    """Settings of LLM.int8."""

    threshold: float = Field(
        6.0, ge=0, description="magnitude from which a feature of the inputs is not rounded at run time; 0: all are"
    )


class Int8(Method[Int8Config]):
    """Row-wise 8-bit codes, bit for bit those of bitsandbytes on a CPU."""

    task: ClassVar[Task] = "quantize"
    needs = NoStatistic
    by_row = True
    baseline = None
    Config = Int8Config

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Quantize one matrix [out, in]; like bitsandbytes, of the weights rounded to float16."""
        limit = torch.finfo(torch.float16).max
        outside = int((weight.abs() > limit).sum())
        codes, largest, _ = int8_vectorwise_quant(weight.clamp(-limit, limit).to(torch.float16).contiguous())
        layer = self._layer(codes, largest.mul(1 / LARGEST)[:, None])
        if not outside:
            return layer
        message = f"{outside} weights beyond {limit:g}, the largest number of float16, were cut to it"
        return replace(layer, events=(Event("overflow", message, data={"weights": float(outside)}),))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        return self._layer(codes, torch.empty(shape[0], 1, device="meta"))

    def _layer(self, codes: Tensor, scale: Tensor) -> Layer:
        form = Quantized(codes, Dense(scale), None, None, (1, codes.shape[1]), BITS)
        return Layer(form, input=InputScheme("llm-int8", threshold=self.config.threshold))


METHOD = Int8
