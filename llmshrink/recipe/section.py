"""The base of a recipe's parts, and how a fault in one is told: a path, what is wrong, the nearest known word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

KeyPath = tuple[str | int, ...]

_SECRET = re.compile(
    r"(^|[_-]|(?<=[a-z])(?=[A-Z]))(?i:token|secret|passw(or)?d|passphrase|credential|(api|access|private)[_-]?key)s?"
    r"($|[_-]|(?=[A-Z]))"
)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known word, else the list of all, else nothing."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""


def fault(at: KeyPath, message: str, value: object = None) -> InitErrorDetails:
    """One fault at a path below the model that is being validated."""
    kind = PydanticCustomError("recipe", "{message}", {"message": message})
    return InitErrorDetails(type=kind, loc=at, input=value)


def refuse(faults: list[InitErrorDetails]) -> ValidationError:
    """The exception that a validator raises; pydantic puts the path of the model before each fault's own."""
    return ValidationError.from_exception_data("recipe", faults)


def faults_of(error: ValidationError, known: Iterable[str], at: KeyPath = ()) -> list[InitErrorDetails]:
    """The faults of an error below the path `at`; an unknown key also names its nearest neighbour in `known`."""
    known = list(known)
    faults = []
    for found in error.errors(include_url=False):
        message, place, context = found["msg"], (*at, *found["loc"]), found.get("ctx", {})
        if found["type"] == "extra_forbidden" and len(found["loc"]) == 1:
            message = unknown_key(str(found["loc"][0]), known)
        elif found["type"] == "union_tag_invalid":
            tags = [tag for tag in context["expected_tags"].replace("'", "").split(", ") if tag != "cut"]
            message, place = (
                f"there is no task '{context['tag']}'" + did_you_mean(context["tag"], tags),
                (*place, "task"),
            )
        elif found["type"] == "union_tag_not_found":
            message, place = "the key is missing", (*place, "task")
        faults.append(fault(place, message, found["input"]))
    return faults


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What is wrong with a key that nothing knows: the word it may be meant for, or where a secret belongs."""
    hint = did_you_mean(key, known)
    if _SECRET.search(key) and "did you mean" not in hint:
        return "no keys or passwords in a recipe: set HF_TOKEN, or run `hf auth login`"
    return "unknown key" + hint


class Section(BaseModel):
    """Base of every part of a recipe: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _hint_unknown_keys(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise refuse(faults_of(error, cls.model_fields)) from None
