"""How a recipe says that a student is found by rounds of training and pruning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmshrink.recipe.section import Section
from llmshrink.recipe.units import Share


class LotterySpec(Section):
    """Iterative magnitude pruning with rewinding: each round trains, prunes the smallest weights, and goes back."""

    rounds: int = Field(
        5, ge=1, le=100, description="of pruning; one training comes before each, and one after the last: the cost"
    )
    sparsity: Share = Field(
        0.8,
        gt=0,
        description="share of the weights of blocks that is zero in the end; each round drops one part of those left",
    )
    rewind: Share = Field(
        0.05,
        description="share of the first training's steps after which weights are remembered: what is kept begins each "
        "later training with what it was then, at the rate of then; 0: with what it was before all",
    )
    per: Literal["matrix", "model"] = Field(
        "matrix", description="which weights compete: those of a matrix, or those of all blocks"
    )

    def early(self, steps: int) -> int:
        """The step of the first training, which has so many, after which weights are remembered."""
        return min(round(self.rewind * steps), steps - 1)

    def share(self, number: int) -> float:
        """The share of the weights that is zero after so many rounds."""
        return float(1 - (1 - self.sparsity) ** (number / self.rounds))


__all__ = ["LotterySpec"]
