"""How a recipe names a method or a format, with its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llmshrink.formats import format_names as format_names
from llmshrink.formats.gguf_mix import MIXES as MIXES
from llmshrink.methods import load_method
from llmshrink.methods import method_names as method_names
from llmshrink.recipe.section import Section, did_you_mean, fault, faults_of, refuse
from llmshrink.transforms import transform_names as transform_names

PACKABLE = ("codebook", "low-rank")  # formats whose codes can be entropy-coded
DEFAULT_METHOD = "gptq"  # whose settings `{bits: 3}` means; a plan takes another where the model needs it

OnIndivisible = Literal["refuse", "smaller_group", "skip", "channel"]  # what becomes of a layer that groups do not fit


class MethodSpec(BaseModel):
    """A method's name beside that method's own settings: the keys that were typed, without defaults."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str | None = Field(None, description="the algorithm; null: the default one for the model")

    @property
    def settings(self) -> dict[str, Any]:
        """The typed settings, without the name."""
        return dict(self.model_extra or {})

    def override(self, keys: Mapping[str, Any]) -> MethodSpec:
        """This method under a layer's own keys; another `name` starts from that method's defaults."""
        name = keys.get("name") or self.name
        kept = self.settings if name == self.name else {}
        return MethodSpec.model_validate({**kept, **keys, "name": name})

    def complete(self) -> dict[str, Any]:
        """Name and settings, with the defaults of a named method written out."""
        if self.name is None:
            return {"name": None, **self.settings}
        return {"name": self.name, **load_method(self.name).Config(**self.settings).model_dump(mode="json")}

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        name = self.name or DEFAULT_METHOD
        if name not in method_names():
            raise refuse([fault(("name",), f"there is no method '{name}'" + did_you_mean(name, method_names()), name)])
        config = load_method(name).Config
        try:
            config.model_validate(self.settings, strict=True)
        except ValidationError as error:
            raise refuse(faults_of(error, config.model_fields)) from None
        return self


class ExportSpec(Section):
    """How codes that are there are written."""

    name: str = Field(description="the checkpoint format")
    pack: bool = Field(
        False,
        description="codebook, low-rank: entropy-code the codes; a smaller file, and as large in memory once loaded",
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in format_names():
            message = f"there is no format '{name}'" + did_you_mean(name, format_names())
            raise refuse([fault((), message, name)])
        return name

    @field_validator("pack")
    @classmethod
    def _check_pack(cls, pack: bool, info: ValidationInfo) -> bool:
        name = info.data.get("name")
        if pack and name is not None and name not in PACKABLE:
            raise refuse([fault((), f"codes of {' and '.join(PACKABLE)} can be packed, those of {name} cannot", pack)])
        return pack


class FormatSpec(ExportSpec):
    """How the result is written; a type alone means the format gguf."""

    type: str | None = Field(
        None, description="gguf: which mix of block types, e.g. Q4_K_M; null: the one that people mean by the bits"
    )

    @model_validator(mode="before")
    @classmethod
    def _type_is_gguf(cls, given: Any) -> Any:
        return {"name": "gguf", **given} if isinstance(given, dict) and given.get("type") is not None else given

    @field_validator("type")
    @classmethod
    def _check_type(cls, mix: str | None, info: ValidationInfo) -> str | None:
        mix = mix and mix.upper()
        if mix is not None and mix not in MIXES:
            raise refuse([fault((), f"there is no GGUF type '{mix}'" + did_you_mean(mix, list(MIXES)), mix)])
        if mix is not None and info.data.get("name", "gguf") != "gguf":
            raise refuse([fault((), f"types are for the format gguf, not for {info.data['name']}", mix)])
        return mix
