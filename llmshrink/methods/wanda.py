"""Wanda: drop the weights that matter least to the outputs, each judged by its magnitude times that of its input.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695: the score is
|w_ij| sqrt(E[x_j^2]), and the weights of one output compete with each other (equation 1, section 3).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from llmshrink.methods.base import Prepared
from llmshrink.methods.sparsity import ScoreMethod, Seen
from llmshrink.statistics import Norm, Statistic


class Wanda(ScoreMethod):
    """Pruning by weights and inputs."""

    needs: ClassVar[type[Statistic]] = Norm
    baseline = "magnitude"

    def score(self, weight: Tensor, prepared: Prepared) -> Tensor:
        """|w| sqrt(E[x^2]) [out, in]; the magnitude alone where nothing is known of the inputs."""
        return weight.abs() * prepared.square.sqrt() if isinstance(prepared, Seen) else weight.abs()


METHOD = Wanda
