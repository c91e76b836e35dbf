"""SVD-LLM: the product whose outputs are nearest to those of the weights, on calibration text.

Wang et al. 2025, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
arXiv 2403.07378. Its closed-form update of the left factor (section 3.2) is done once the right one is rounded.
"""

from __future__ import annotations

from typing import ClassVar

from llmshrink.methods.base import Prepared
from llmshrink.methods.hessian import DampConfig, Factors, factorised
from llmshrink.methods.lowrank import FALLBACK, LowRankConfig, LowRankMethod, Metric
from llmshrink.statistics import Hessian, Statistic


class SvdLlmConfig(LowRankConfig, DampConfig):
    """Settings of SVD-LLM."""


class SvdLlm(LowRankMethod):
    """Products by outputs."""

    needs: ClassVar[type[Statistic]] = Hessian
    Config = SvdLlmConfig

    def prepare(self, statistic: Statistic) -> Prepared:
        """The second moment of the inputs, damped."""
        assert isinstance(statistic, Hessian) and isinstance(self.config, SvdLlmConfig)
        together = 1 if self.config.bits is None else self.rest.config.most(len(statistic.matrix))
        return factorised(
            statistic, self.config, act_order=True, adjacent=together, otherwise=FALLBACK, dead="not counted"
        )

    def metric(self, prepared: Prepared) -> Metric:
        """The second moment; all inputs weigh the same where it could not be used."""
        return Metric(prepared.H, prepared.damp) if isinstance(prepared, Factors) else Metric(None)


METHOD = SvdLlm
