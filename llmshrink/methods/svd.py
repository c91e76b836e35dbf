"""The truncated singular value decomposition: the product nearest to the weights themselves, whatever inputs are.

Eckart and Young 1936, "The approximation of one matrix by another of lower rank", Psychometrika 1.
"""

from __future__ import annotations

from typing import ClassVar

from llmshrink.methods.base import Prepared
from llmshrink.methods.lowrank import LowRankMethod
from llmshrink.methods.metric import Metric
from llmshrink.statistics import NoStatistic, Statistic


class Svd(LowRankMethod):
    """Products by weights alone."""

    needs: ClassVar[type[Statistic]] = NoStatistic
    baseline = None

    def metric(self, prepared: Prepared) -> Metric:
        """All inputs weigh the same."""
        return Metric(None)


METHOD = Svd
