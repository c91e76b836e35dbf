"""SparseGPT: drop weights column by column, and let the columns still to come make up for what is lost.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv 2301.00774. Within a block of columns the weights with the smallest w^2 / [H^-1]_jj go, with the inverse over the
columns that are not done yet (algorithm 1): what dropping them costs once all later columns have made up for it.

Then, beyond the paper, the kept weights of each row are refitted together under the final mask (`sparsity.refit`), and
with `bits` they are rounded by GPTQ, which keeps zeros, so one statistic serves both. The block error minimised is
the squared error of the layer's outputs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Layer, Objective, Quantized, Sparse, decode
from llmshrink.methods.base import GroupConfig, Method, MethodConfig, Prepared, Task
from llmshrink.methods.gptq import Gptq, GptqConfig
from llmshrink.methods.hessian import LEAF, DampConfig, Factors, factorised, in_halves, output_error
from llmshrink.methods.sparsity import (
    SparsityConfig,
    better_filled,
    dropped,
    highest,
    keep_highest,
    meta,
    pruned,
    refit,
)
from llmshrink.statistics import Hessian, Statistic

BLOCK = 128  # columns whose mask is chosen together, as in the paper
FALLBACK = ("magnitude_fallback", "pruned by magnitude")


class SparseGptConfig(SparsityConfig, GroupConfig, DampConfig):
    """Settings of SparseGPT."""

    refit: int = Field(
        10, ge=0, description="steps of conjugate gradients that fit the kept weights to the outputs; 0: the paper's"
    )
    bits: Literal[2, 3, 4, 8] | None = Field(None, description="bits per kept weight, by GPTQ; null: they stay floats")
    symmetric: bool = Field(
        True, description="with bits: zero is the code 0; false stores a zero point for every scale"
    )

    @property
    def rounding(self) -> GptqConfig | None:
        """How kept weights are rounded; None: they are not."""
        if self.bits is None:
            return None
        return GptqConfig(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, damp=self.damp)


class SparseGpt(Method[SparseGptConfig]):
    """SparseGPT with a least-squares refit, and GPTQ on what is kept."""

    task: ClassVar[Task] = "prune"
    needs: ClassVar[type[Statistic]] = Hessian
    baseline = "magnitude"
    Config: ClassVar[type[MethodConfig]] = SparseGptConfig

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be pruned so, or None."""
        found = self.config.why_not(shape)
        if found is None and (rounding := self.config.rounding) is not None:
            return rounding.why_not(shape)
        return found

    def prepare(self, statistic: Statistic) -> Prepared:
        """Factorise the Hessian once for all linears fed by the same tensor, its columns in their own order."""
        assert isinstance(statistic, Hessian)
        return factorised(statistic, self.config, act_order=False, otherwise=FALLBACK, dead="dropped first")

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Prune one matrix [out, in]; where magnitudes alone do better on the whole, these stand."""
        W = weight.float()
        plain = keep_highest(W.abs(), self.config, "matrix")
        if not isinstance(prepared, Factors):
            return self._rounded(Layer(pruned(W, plain, self.config, weight.dtype)), prepared)
        mask, values = self._sweep(W, prepared)
        fitted = refit(W, values, mask, prepared.H, prepared.damp, self.config.refit)
        layer = better_filled(W, mask, (values, fitted), prepared.H, self.config, weight.dtype)
        own = output_error(W, decode(layer.weight), prepared.H)
        baseline = output_error(W, W * plain, prepared.H)
        if not float(own.sum()) <= float(baseline.sum()):
            layer, own = Layer(pruned(W, plain, self.config, weight.dtype)), baseline
        return self._rounded(Layer(layer.weight, Objective(own, baseline)), prepared)

    def _sweep(self, W: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
        """Mask and values [out, in] by the paper's algorithm 1, on a transposed copy so that a column is contiguous."""
        rest, spread = W.T.clone(memory_format=torch.contiguous_format), factors.spread
        mask = torch.empty(rest.shape, dtype=torch.bool, device=W.device)
        result = torch.empty_like(rest)
        n, m = self.config.kept_of or (0, 0)
        together = BLOCK if m == 0 else BLOCK // m * m
        inside = m > 0 and LEAF % m == 0  # a pattern is chosen when its columns are reached

        def choose(start: int, stop: int) -> None:
            cost = rest[start:stop].square().mul_(factors.pivots[start:stop, None])
            if m:
                picked = highest(cost.T.reshape(-1, m), n).view(len(W), -1)
            else:
                last, here = (dropped((len(W), column), self.config, "matrix") for column in (start, stop))
                picked = highest(cost.T.reshape(1, -1), cost.numel() - (here - last)).view(len(W), -1)
            mask[start:stop] = picked.T

        def one_by_one(start: int, stop: int) -> None:
            block, errors = rest[start:stop], torch.empty_like(rest[start:stop])
            for i in range(start, stop):
                if inside and i % m == 0:
                    choose(i, i + m)
                torch.mul(rest[i], mask[i], out=result[i])
                torch.sub(rest[i], result[i], out=errors[i - start])
                block.addr_(spread[i, start:stop], errors[i - start], alpha=-1)
            block.copy_(errors)

        def pass_on(start: int, middle: int, stop: int) -> None:
            rest[middle:stop].addmm_(spread[start:middle, middle:stop].T, rest[start:middle], alpha=-1)

        for start in range(0, len(rest), together):
            stop = min(start + together, len(rest))
            if not inside:
                choose(start, stop)
            in_halves(start, stop, one_by_one, pass_on)
            pass_on(start, stop, len(rest))
        return mask.T.contiguous(), result.T.contiguous()

    def _rounded(self, layer: Layer, prepared: Prepared) -> Layer:
        """The same with the kept weights rounded, where bits are asked for."""
        rounding, form = self.config.rounding, layer.weight
        if rounding is None:
            return layer
        assert isinstance(form, Sparse)
        found = Gptq(rounding, self.scales).compress(decode(form).masked_fill_(~form.mask, 0), prepared)
        assert isinstance(found.weight, Quantized)
        return Layer(Sparse(form.mask, found.weight, form.kept, form.pattern), layer.objective)

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        whole = meta(shape, dtype, self.config, "matrix")
        if self.config.rounding is None:
            return Layer(whole)
        rounded = self.config.rounding.meta(shape, self.scales or dtype)
        return Layer(Sparse(whole.mask, rounded.weight, whole.kept, whole.pattern))


METHOD = SparseGpt
