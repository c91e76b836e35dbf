"""How a recipe says that the settings of each layer are chosen by what they cost, to meet a size."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llmshrink.recipe.section import Section, fault, refuse
from llmshrink.recipe.units import SizeLimit


class AllocateSpec(Section):
    """Choose the settings of each layer: those that change the model least at the size that is asked for."""

    size: SizeLimit | None = Field(
        None,
        description="largest size of the files that hold tensors: bytes, 3.5GiB, 500MB, or 30% of the original's; met "
        "from below",
    )
    bpw: float | None = Field(
        None, gt=0, le=32, description="or bits per weight: those of all tensors over all parameters"
    )
    candidates: list[dict[str, Any]] | None = Field(
        None,
        min_length=1,
        description="what a layer can get: the method's keys that differ, as in `layers`; null: those of 2, 3, 4 and 8 "
        "bits that divide the layer's width, for gguf the block types Q2_K to Q8_0, for a pruning sparsities of 0.3 to "
        "0.8. Layers that `layers` names are not chosen for",
    )
    score: Literal["kl", "block"] = Field(
        "kl",
        description="what a candidate costs: the divergence that it alone makes in the output of the model, or the "
        "relative squared error in that of its block, which is faster",
    )
    rows: int = Field(8, ge=1, description="calibration rows on which that is measured")
    length: int = Field(256, ge=2, description="tokens of such a row")

    @property
    def aimed(self) -> bool:
        """Whether it says how large the result may be."""
        return self.size is not None or self.bpw is not None

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.size is not None and self.bpw is not None:
            raise refuse([fault(("bpw",), "the size says it already: leave out one or the other", self.bpw)])
        return self
