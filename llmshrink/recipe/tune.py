"""How the scales and norms of a whole model are tuned."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from llmshrink.recipe.section import Section


class TuneSpec(Section):
    """Tune scales, norms and biases through the whole model, towards what the original gives out."""

    optional: bool = Field(
        False, description="where model or format cannot be tuned, leave it out and tell so; false: refuse the recipe"
    )
    steps: int = Field(20, ge=1, description="steps of gradient")
    tokens: int = Field(1024, ge=1, description="calibration tokens in a step, in whole batches")
    rate: float = Field(
        0.0015,
        ge=0,
        lt=1,
        description="by what share a step moves a scale; a quarter of it where the model gets no better",
    )
    norm_rate: float = Field(
        0.0015, ge=0, lt=1, description="by what share of a norm's, or a bias's, root mean square a step moves it"
    )

    @property
    def slower(self) -> tuple[Self, Self]:
        """As it is, and what to try where the model gets no better."""
        changes = {"rate": self.rate / 4, "norm_rate": self.norm_rate / 4}
        return self, self.model_copy(update=changes)
