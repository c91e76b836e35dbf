"""Ternary weights: every weight becomes -s, 0 or s, with the scale s of its group (Li et al. 2016, arXiv 1605.04711).

Worth having after training that knows of it (quantization-aware training, BitNet b1.58): weights that are ternary
already come out as they are, bit for bit. Of any other model little is left, and where codes are stored in two bits
each, `rtn` and `gptq` have a fourth level at the same bytes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from llmshrink.forms import Dense, Layer, Quantized
from llmshrink.methods.base import GroupConfig, Method, Prepared, Task
from llmshrink.methods.even import CHUNK, stored
from llmshrink.statistics import NoStatistic

BITS = 2  # of a stored code


class TernaryConfig(GroupConfig):
    """Settings of ternary rounding."""


class Ternary(Method[TernaryConfig]):
    """The codes in {-1, 0, 1} and the scales that are nearest to the weights."""

    task: ClassVar[Task] = "quantize"
    needs = NoStatistic
    by_row = True
    baseline = None
    caution = "ternary weights suit models that were trained for them (quantization-aware training, BitNet)"
    Config = TernaryConfig

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be compressed, or None."""
        return self.config.why_not(shape)

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Quantize one matrix [out, in]."""
        out, width = weight.shape
        group, dtype = self.config.group(width), self.scales or weight.dtype
        scales, codes = [], []
        for rows in torch.split(weight.float(), max(1, CHUNK // width)):
            scale, steps = self.fit(rows.reshape(len(rows), -1, group), dtype)
            scales.append(scale.to(dtype))
            codes.append(steps.to(torch.int8))
        table = Dense(torch.cat(scales))
        return Layer(Quantized(torch.cat(codes).view(out, width), table, None, None, (1, group), BITS))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        out, width = shape
        group = self.config.group(width)
        scale = Dense(torch.empty(out, width // group, dtype=self.scales or dtype, device="meta"))
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        return Layer(Quantized(codes, scale, None, None, (1, group), BITS))

    @staticmethod
    def fit(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales [rows, groups], as they are stored in `dtype`, and codes of float32 weights [rows, groups, group].

        If the k largest magnitudes are kept, their mean is the best scale, and it takes (their sum)^2 / k off the
        squared error: the best of all k is found from one sort. In float64 the mean of equal numbers is that number.
        """
        sums = w.abs().sort(dim=2, descending=True).values.cumsum(2, dtype=torch.float64)
        kept = torch.arange(1, w.shape[2] + 1, dtype=torch.float64, device=w.device)
        best = (sums.square() / kept).argmax(2, keepdim=True)
        scale = stored((sums / kept).gather(2, best).squeeze(2), dtype)
        return scale, (w / scale[..., None]).round_().clamp_(-1, 1)


METHOD = Ternary
