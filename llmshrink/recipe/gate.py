"""What a result must keep to: limits of quality and size."""

from __future__ import annotations

from pydantic import Field

from llmshrink.recipe.section import Section
from llmshrink.recipe.units import Share, SizeLimit


class GateSpec(Section):
    """What the result must keep to; what does not, or could not be measured, ends with exit code 9."""

    max_ppl_increase: Share | None = Field(
        None,
        ge=0,
        description="by how much perplexity may grow on any evaluation text, as a share (3%); if it falls by more than "
        "that, and by more than 1%, the gate fails too: compression makes no model better (learning may)",
    )
    max_kl: float | None = Field(
        None, ge=0, description="largest KL to the original on any text, nats per token or per row classed"
    )
    min_top1: Share | None = Field(
        None, ge=0, le=1, description="smallest share of tokens (rows) with the original's first choice, on any text"
    )
    max_size: SizeLimit | None = Field(
        None, description="largest size of the files that hold tensors: bytes, 3.5GiB, 500MB, or 30% of the original's"
    )

    @property
    def quality(self) -> list[str]:
        """The gates that are asked for and need text to be measured on."""
        return [name for name in ("max_ppl_increase", "max_kl", "min_top1") if getattr(self, name) is not None]
