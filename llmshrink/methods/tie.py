"""One matrix in place of several that are alike: what their outputs on calibration text are nearest to together.

The tensor that costs least in all outputs has a closed form, (sum H_i)^-1 sum H_i W_i^T, H_i the second moments of the
inputs; each H_i counts by one over the size of its own matrix's outputs. Models whose layers are tied before they are
trained bear it (ALBERT, Lan et al. 2020, arXiv 1909.11942); of others much is lost, and the report says how much.

It stands beside products of factors, as it is one: of all matrices on top of each other, where every row of each is a
row of the right factor. So nothing but that factor is stored (`LowRank.pivots`), once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Dense, Layer, LowRank
from llmshrink.methods.base import Prepared, Task
from llmshrink.methods.basis import Sharing
from llmshrink.methods.hessian import DampConfig
from llmshrink.methods.lowrank import COPIES, DOUBLE, KeepConfig, moment
from llmshrink.methods.metric import SOLVABLE, Metric
from llmshrink.statistics import Hessian, Statistic


class TieConfig(KeepConfig, DampConfig):
    """Settings of tying."""

    keep: float = Field(
        0.9, gt=0, lt=1, description="share that is stored of the numbers of all matrices that can be one"
    )
    blocks: int = Field(2, ge=2, description="adjacent blocks of which matrices of one name can become one")

    @property
    def kept(self) -> float:
        """The share that is stored."""
        return self.keep


class Tie(Sharing):
    """Matrices that are one."""

    task: ClassVar[Task] = "factorize"
    needs: ClassVar[type[Statistic]] = Hessian
    Config = TieConfig
    learnable = False  # by what one block gets, others would be harmed

    def scratch(self, shape: tuple[int, int]) -> int:
        """Bytes that `compress` holds: what others stored, and the matrix."""
        return DOUBLE * COPIES * shape[0] * shape[1]

    def pointless(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix is left alone, or None."""
        return None if self.place else "no other of its name, shape and settings lies in the blocks that can be one"

    def prepare(self, statistic: Statistic) -> Prepared:
        """The second moment of the inputs, damped."""
        return moment(statistic, self.config)

    def metric(self, prepared: Prepared) -> Metric:
        """The second moment; all inputs weigh the same where it could not be used."""
        return Metric.of(prepared)

    def join(
        self, weights: Sequence[Tensor], metrics: Sequence[Metric], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """The tensor that stands for all of them, of which every row is a row of each."""
        whole = torch.ones(len(weights[0]), dtype=torch.bool, device=weights[0].device)
        return nearest(weights, metrics).to(dtype), [whole] * len(weights)

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """The tensor of all; the matrix itself where there is none."""
        found = weight if self.place is None or self.place.right is None else self.place.right
        return self._layer(found.to(weight.device, copy=True).contiguous(), weight.device)

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        meta = torch.device("meta")
        return self._layer(torch.empty(shape, dtype=dtype, device=meta), meta)

    def _layer(self, whole: Tensor, device: torch.device) -> Layer:
        left = Dense(torch.empty(0, len(whole), dtype=whole.dtype, device=device))
        rows = torch.ones(len(whole), dtype=torch.bool, device=device)
        return Layer(LowRank(left, Dense(whole), rows, 0, None if self.place is None else self.place.home))


def nearest(weights: Sequence[Tensor], metrics: Sequence[Metric]) -> Tensor:
    """The matrix [out, in] of which the errors in place of each, as shares of its size, add up to least; float64.

    Args:
        weights: float64 [out, in] each.
        metrics: what the inputs of each weigh.
    """
    width = weights[0].shape[1]
    total, wanted = torch.zeros(2, 1, dtype=torch.float64, device=weights[0].device)
    sizes = [float(metric.error(weight).sum()) for metric, weight in zip(metrics, weights, strict=True)]
    there = [size for size in sizes if size > 0] or [1.0]
    for weight, metric, size in zip(weights, metrics, sizes, strict=True):
        size = size or sum(there) / len(there)  # a matrix of zeros has none
        total = total + metric.dense(width).to(total.device) / size
        wanted = wanted + metric.weigh(weight) / size
    total.diagonal().add_(SOLVABLE * total.diagonal().mean() + torch.finfo(torch.float64).tiny)
    found: Tensor = torch.linalg.solve(total, wanted.T)
    return found.T


def lost(weights: Sequence[Tensor], metrics: Sequence[Metric]) -> list[float]:
    """The error of each in the nearest one's place, as a share of its size."""
    one = nearest(weights, metrics)
    pairs = list(zip(weights, metrics, strict=True))
    sizes = [max(float(metric.error(weight).sum()), torch.finfo(torch.float64).tiny) for weight, metric in pairs]
    return [float(m.error(weight - one).sum()) / size for (weight, m), size in zip(pairs, sizes, strict=True)]


METHOD = Tie
