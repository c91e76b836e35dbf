"""What a student can learn from beside the words of its teacher."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from llmshrink.recipe.section import Section, fault, refuse


class HiddenSpec(Section):
    """States that leave the student's layers are drawn to those that leave the teacher's, beside the loss."""

    weight: float = Field(1.0, gt=0, description="of the mean over the layers, per token, beside `loss`")
    layers: Literal["auto"] | dict[int, int] = Field(
        "auto",
        description="layer of the student -> layer of the teacher, from 0; auto: all of a student that layers were "
        "dropped from, each to the last layer before the next one that was kept; else all of it, evenly spread",
    )
    loss: Literal["squarehead", "mse", "cosine"] = Field(
        "squarehead",
        description="squarehead: the mean squared difference over the mean square of the teacher's, of each layer; "
        "mse: the mean squared difference; cosine: one less the cosine",
    )
    projection: Literal["auto"] | bool = Field(
        "auto",
        description="learn a matrix for each layer that makes the teacher's width of the student's, thrown away in the "
        "end; auto: where widths differ",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _numbers(cls, given: Any) -> Any:
        """JSON knows keys of letters alone."""
        if not isinstance(given, dict):
            return given
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: value for key, value in given.items()}

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, given: str | dict[int, int]) -> str | dict[int, int]:
        if isinstance(given, dict) and (not given or min([*given, *given.values()]) < 0):
            raise refuse([fault((), "it names at least one layer of the student, from 0, with one of the teacher")])
        return given


class PolicySpec(Section):
    """Rows of some steps are continued by the student itself, and its teacher says what it finds of that."""

    share: float = Field(0.5, gt=0, le=1, description="how likely a batch's rows are the student's own continuations")
    prompt: float = Field(
        0.25, gt=0, lt=1, description="share of a row that stays; where its beginning is not learned, that stays alone"
    )
    tokens: int | None = Field(None, ge=1, description="tokens that are drawn at most; null: to the row's end")
    temperature: float = Field(1.0, gt=0, description="that they are drawn at")
