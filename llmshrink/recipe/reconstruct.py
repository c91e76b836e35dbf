"""How the codes of a block are learned."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from llmshrink.recipe.section import Section


class ReconstructSpec(Section):
    """Learn the codes and scales of each block by gradient, against the original's output."""

    steps: int = Field(200, ge=1, description="steps of gradient for each block")
    tokens: int = Field(1024, ge=1, description="calibration tokens in a step, in whole batches")
    rate: float = Field(
        0.01,
        gt=0,
        le=1,
        description="how far a step of gradient moves a weight, in steps of its grid; a quarter of it where a block "
        "gets no better",
    )
    scale_rate: float = Field(0.002, ge=0, lt=1, description="by what share a step moves a scale")

    @property
    def slower(self) -> tuple[Self, Self]:
        """As it is, and what to try where a block gets no better: one that is nearly right already."""
        changes = {"rate": self.rate / 4, "scale_rate": self.scale_rate / 4}
        return self, self.model_copy(update=changes)
