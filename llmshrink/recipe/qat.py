"""How a model is trained through the rounding of the grid that it is written on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from llmshrink.recipe.method import DEFAULT_METHOD, FormatSpec, MethodSpec, OnIndivisible
from llmshrink.recipe.reconstruct import ReconstructSpec
from llmshrink.recipe.section import Section, faults_of, refuse

if TYPE_CHECKING:
    from llmshrink.recipe.stages import QuantizeStage

AS_ASKED = ("method", "layers", "ignore", "reconstruct", "format", "on_indivisible")  # as in a stage that quantizes


class QatSpec(Section):
    """Round the student as `quantize` does, then learn its codes and scales with all else of it."""

    method: MethodSpec = Field(
        default_factory=lambda: MethodSpec(name=DEFAULT_METHOD),
        description="what chooses the codes and scales that are learned from there, with its settings: gptq with 4 "
        "bits where it has no name",
    )
    layers: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict, description="keys of the method that differ in some layers, as in a stage that quantizes"
    )
    ignore: list[str] = Field(
        default_factory=list, description="regular expressions over whole layer names; these are not rounded"
    )
    reconstruct: ReconstructSpec | None = Field(
        None, description="learn the codes of each block before, or {} with its defaults; null: they are not"
    )
    format: FormatSpec | None = Field(None, description="compressed-tensors, gptq or awq; null: compressed-tensors")
    on_indivisible: OnIndivisible | None = Field(
        None, description="what to do with a layer that the group size does not divide, as in a stage that quantizes"
    )
    scale_rate: float = Field(1e-3, ge=0, lt=1, description="by what share a step of gradient moves a scale")

    @property
    def stage(self) -> QuantizeStage:
        """The stage that makes what learning starts from."""
        from llmshrink.recipe.stages import QuantizeStage  # which knows the stage that this is a part of

        return QuantizeStage.model_validate({"task": "quantize", **{key: getattr(self, key) for key in AS_ASKED}})

    @field_validator("method", mode="before")
    @classmethod
    def _name_it(cls, given: Any) -> Any:
        return {"name": DEFAULT_METHOD, **(given or {})} if given is None or isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        try:
            _ = self.stage
        except ValidationError as error:
            raise refuse(faults_of(error, AS_ASKED)) from None
        return self
