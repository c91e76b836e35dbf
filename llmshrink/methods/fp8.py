"""FP8: weights as 8-bit floats (E4M3: 4 bits of exponent, 3 of mantissa; Micikevicius et al. 2022, arXiv 2209.05433).

A weight means scale * code. Floats are nearly as exact at any scale: what a search can gain is where between two powers
of two the weights come to lie, and what little is lost among the smallest.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import LARGEST, LIMITS, Dense, Layer, Quantized
from llmshrink.methods.base import Method, MethodConfig, Prepared, Task
from llmshrink.methods.even import stored
from llmshrink.statistics import NoStatistic

STEPS = 16  # scales tried within a power of two


class Fp8Config(MethodConfig):
    """Settings of 8-bit floats."""

    bits: Literal[8] = Field(8, description="bits per weight")
    scale_per: Literal["channel", "tensor"] = Field("channel", description="one scale per output, or for the matrix")
    scales: Literal["minmax", "mse"] = Field("mse", description="cover the range, or search for the least error")


class Fp8(Method[Fp8Config]):
    """Weights rounded to the nearest float8_e4m3fn under a scale."""

    task: ClassVar[Task] = "quantize"
    needs = NoStatistic
    baseline = None
    Config = Fp8Config

    def __init__(self, config: Fp8Config, scales: torch.dtype | None = None) -> None:
        """`scales` is what the format stores scales in; None: the dtype of the weight."""
        super().__init__(config, scales)
        self.by_row = config.scale_per == "channel"

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Quantize one matrix [out, in]."""
        W, kind = weight.float(), self.scales or weight.dtype
        rows = W if self.by_row else W.view(1, -1)
        covering = rows.abs().amax(1, keepdim=True) / LARGEST["float"]
        scale = stored(covering, kind)
        if self.config.scales == "mse":
            error = _error(rows, scale)
            for factor in torch.linspace(1, 2, STEPS + 1)[1:-1].tolist():
                wider = stored(covering * factor, kind)
                found = _error(rows, wider)
                scale, error = torch.where(found < error, wider, scale), torch.minimum(found, error)
        return Layer(self._form(_codes(W, scale), scale.to(kind)))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        scale = torch.empty(shape[0] if self.by_row else 1, 1, dtype=self.scales or dtype, device="meta")
        return Layer(self._form(codes, scale))

    def _form(self, codes: Tensor, scale: Tensor) -> Quantized:
        rows, width = codes.shape
        return Quantized(codes, Dense(scale), None, None, (1 if self.by_row else rows, width), self.config.bits)


def _codes(W: Tensor, scale: Tensor) -> Tensor:
    """The nearest codes, as float8_e4m3fn."""
    return (W / scale).clamp_(*LIMITS["float"]).to(torch.float8_e4m3fn)


def _error(rows: Tensor, scale: Tensor) -> Tensor:
    """Squared error [rows, 1]."""
    return _codes(rows, scale).float().mul_(scale).sub_(rows).square_().sum(1, keepdim=True)


METHOD = Fp8
