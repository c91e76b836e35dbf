"""ASVD: the product nearest to the weights, each counted by how large its input is.

Yuan et al. 2023, "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
arXiv 2312.05821: W S is decomposed for a diagonal S of the mean magnitudes of the inputs, each to the power alpha
(section 4.1, where alpha is 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from llmshrink.forms import Event
from llmshrink.methods.base import Prepared
from llmshrink.methods.lowrank import FALLBACK, LowRankConfig, LowRankMethod
from llmshrink.methods.metric import Metric
from llmshrink.statistics import Magnitude, Statistic


class AsvdConfig(LowRankConfig):
    """Settings of ASVD."""

    alpha: float = Field(0.5, gt=0, le=2, description="power of the mean magnitude of an input that its weights count")


@dataclass(frozen=True, kw_only=True)
class Seen(Prepared):
    """What the linears of a group share."""

    square: Tensor  # float64 [in], of S


class Asvd(LowRankMethod):
    """Products by weights and the size of inputs."""

    needs: ClassVar[type[Statistic]] = Magnitude
    Config = AsvdConfig

    def prepare(self, statistic: Statistic) -> Prepared:
        """What each input counts."""
        assert isinstance(statistic, Magnitude) and isinstance(self.config, AsvdConfig)
        kind, words = FALLBACK
        if statistic.tokens == 0:
            return Prepared((Event(kind, f"{words}: no calibration token reached it"),))
        if not statistic.mean.isfinite().all():
            return Prepared((Event(kind, f"{words}: its inputs are not finite"),))
        dead = int((statistic.mean == 0).sum())
        message = f"{dead} of {len(statistic.mean)} inputs were always zero: their weights are not counted"
        told = (Event("dead_columns", message, data={"columns": float(dead)}),) if dead else ()
        return Seen(told, square=statistic.mean.double() ** (2 * self.config.alpha))

    def metric(self, prepared: Prepared) -> Metric:
        """The squares of S; all inputs weigh the same where nothing is known of them."""
        return Metric(prepared.square) if isinstance(prepared, Seen) else Metric(None)


METHOD = Asvd
