"""Drop the weights with the smallest magnitude.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from llmshrink.methods.base import MethodConfig, Prepared
from llmshrink.methods.sparsity import Per, RowConfig, ScoreMethod


class MagnitudeConfig(RowConfig):
    """Settings of pruning by magnitude."""

    per: Per = Field("matrix", description="which weights compete: those of one output, or those of the whole matrix")


class Magnitude(ScoreMethod):
    """Pruning by |w|: looks at no text."""

    Config: ClassVar[type[MethodConfig]] = MagnitudeConfig

    def score(self, weight: Tensor, prepared: Prepared) -> Tensor:
        """|w| [out, in]."""
        return weight.abs()


METHOD = Magnitude
