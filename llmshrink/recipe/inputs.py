"""How a recipe says that the inputs of linears are rounded too."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llmshrink.recipe.section import Section, fault, refuse


class InputSpec(Section):
    """How inputs of linears are rounded, so that runtimes multiply 8-bit numbers."""

    type: Literal["int8", "fp8"] = Field(description="what inputs are rounded to; weights must be of the same kind")
    scales: Literal["dynamic", "static"] = Field(
        "dynamic", description="of inputs: found anew for each token, or one for each layer, from calibration text"
    )
    observer: Literal["minmax", "percentile", "mse"] | None = Field(
        None,
        description="where static scales clip: at the largest input seen, at its 99.99th percentile, or where the "
        "squared error is least; null: mse",
    )

    @model_validator(mode="before")
    @classmethod
    def _type_alone(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_observer(self) -> Self:
        if self.observer is not None and self.scales == "dynamic":
            raise refuse([fault(("observer",), "only static scales have one: set scales to static", self.observer)])
        return self
