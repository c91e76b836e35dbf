"""SVD-LLM: the product whose outputs are nearest to those of the weights, on calibration text.

Wang et al. 2025, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
arXiv 2403.07378. Its closed-form update of the left factor (section 3.2) is done once the right one is rounded.

With `blocks`, matrices of one name in adjacent blocks share the right factor (`basis`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmshrink.forms import Dense, Layer, LowRank
from llmshrink.methods.base import Prepared
from llmshrink.methods.basis import Sharing, basis
from llmshrink.methods.hessian import DampConfig
from llmshrink.methods.lowrank import COPIES, DOUBLE, SQUARES, LowRankConfig, LowRankMethod, moment
from llmshrink.methods.metric import Metric, fitted
from llmshrink.statistics import Hessian, Statistic


class SvdLlmConfig(LowRankConfig, DampConfig):
    """Settings of SVD-LLM."""

    blocks: int = Field(
        1,
        ge=1,
        description="adjacent blocks whose matrices of one name share their right factor; where ranks are found, those "
        "that lose less so than with factors of their own",
    )

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        taken = [name for name in ("bits", "factor_bits") if getattr(self, name) is not None]
        if self.blocks > 1 and (taken or self.pivots is False):
            name = taken[0] if taken else "pivots: false"
            raise ValueError(f"`{name}` is not for `blocks`: what they share is rows of the products, as floats")
        return self


class SvdLlm(LowRankMethod, Sharing):
    """Products by outputs."""

    needs: ClassVar[type[Statistic]] = Hessian
    Config = SvdLlmConfig

    def prepare(self, statistic: Statistic) -> Prepared:
        """The second moment of the inputs, damped."""
        assert isinstance(statistic, Hessian) and isinstance(self.config, SvdLlmConfig)
        together = 1 if self.config.bits is None else self.rest.config.most(len(statistic.matrix))
        return moment(statistic, self.config, together)

    def metric(self, prepared: Prepared) -> Metric:
        """The second moment; all inputs weigh the same where it could not be used."""
        return Metric.of(prepared)

    def join(
        self, weights: Sequence[Tensor], metrics: Sequence[Metric], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """The right factor of all on top of each other, and of each the rows that are rows of it."""
        assert self.place is not None
        rank = self.config.rank_of(self.place.stacked((len(weights[0]), weights[0].shape[1])))
        return basis(weights, metrics, rank, dtype)

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be factored so, or None."""
        return super().check(shape) if self.place is None else self.config.why_not(self.place.stacked(shape))

    def scratch(self, shape: tuple[int, int]) -> int:
        """Bytes that `compress` holds: the matrix or the right factor and what comes of it, in float64."""
        if self.place is None:
            return super().scratch(shape)
        rank = self.config.rank_of(self.place.stacked(shape))
        return DOUBLE * (COPIES * max(shape[0], rank) * shape[1] + SQUARES * rank**2)

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Factor one matrix [out, in]; with a right factor that is there, find the left one."""
        if self.place is None:
            return super().compress(weight, prepared)
        assert self.place.right is not None and self.place.pivots is not None
        right, chosen = (tensor.to(weight.device, copy=True) for tensor in (self.place.right, self.place.pivots))
        left = fitted(weight.double(), right.double(), self.metric(prepared))[~chosen]
        own = self.place.own(len(right))
        return Layer(
            LowRank(Dense(left.to(weight.dtype).contiguous()), Dense(right), chosen, own.start, self.place.home)
        )

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        if self.place is None:
            return super().form(shape, dtype)
        rank = self.config.rank_of(self.place.stacked(shape))
        own = self.place.own(rank)
        left = torch.empty(shape[0] - (own.stop - own.start), rank, dtype=dtype, device="meta")
        right = torch.empty(rank, shape[1], dtype=dtype, device="meta")
        chosen = torch.empty(shape[0], dtype=torch.bool, device="meta")
        return Layer(LowRank(Dense(left), Dense(right), chosen, own.start, self.place.home))


METHOD = SvdLlm
