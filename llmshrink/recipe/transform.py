"""How a recipe names what is done to weights before they are compressed."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmshrink.recipe.section import did_you_mean, fault, faults_of, refuse
from llmshrink.transforms import load_transform, transform_names


class TransformSpec(BaseModel):
    """A transform's name beside its own settings: the keys that were typed, without defaults."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str = Field(description="the transform")

    @property
    def settings(self) -> dict[str, Any]:
        """The typed settings, without the name."""
        return dict(self.model_extra or {})

    def complete(self) -> dict[str, Any]:
        """Name and settings, with the defaults written out."""
        return {"name": self.name, **load_transform(self.name).Config(**self.settings).model_dump(mode="json")}

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if self.name not in transform_names():
            message = f"there is no transform '{self.name}'" + did_you_mean(self.name, transform_names())
            raise refuse([fault(("name",), message, self.name)])
        config = load_transform(self.name).Config
        try:
            config.model_validate(self.settings, strict=True)
        except ValidationError as error:
            raise refuse(faults_of(error, config.model_fields)) from None
        return self
