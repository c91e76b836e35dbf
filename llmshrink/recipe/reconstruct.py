"""How the codes of a block are learned."""

from __future__ import annotations

from pydantic import Field

from llmshrink.recipe.section import Section


class ReconstructSpec(Section):
    """Learn the codes and scales of each block by gradient, against the original's output."""

    steps: int = Field(140, ge=1, description="steps of gradient for each block")
    tokens: int = Field(1024, ge=1, description="calibration tokens in a step, in whole batches")
    rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="how far a step of gradient moves a weight, in steps of its grid; null: 0.01 up to 3 bits, 0.005 "
        "with more; a quarter of it where a block gets no better",
    )
    weight_rate: float = Field(
        0.002,
        gt=0,
        le=1,
        description="how far it moves a weight that has no grid, as a share of their root mean square",
    )
    scale_rate: float = Field(0.002, ge=0, lt=1, description="by what share a step moves a scale")

    def rate_of(self, bits: int) -> float:
        """The rate of a matrix with so many bits."""
        return self.rate or (0.01 if bits <= 3 else 0.005)  # noqa: PLR2004 - measured: dev/LOG.md
