"""Quantities in the words people write them in: `3%`, `3.5GiB`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, ByteSize, PlainSerializer, PlainValidator, TypeAdapter, WithJsonSchema
from pydantic_core import PydanticCustomError

_NUMBER = r"[0-9]{1,15}(?:\.[0-9]+)?"
_PERCENT = rf"{_NUMBER}\s*%"
_AMOUNT = rf"{_NUMBER}\s*[A-Za-z]*"
_LARGEST = 2**63
_bytes = TypeAdapter(ByteSize)


def _share(value: Any) -> float:
    """A share from `3%` or 0.03; numbers of 1 and above are refused, because most people mean percent by them."""
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(_PERCENT, text):
            return float(f"{text.rstrip('%').strip()}e-2")
        value = float(text) if re.fullmatch(_NUMBER, text) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("recipe", "Input should be a share such as 3%")
    if value >= 1:
        message = "Input should be below 1, or have a percent sign: write {said}%"
        raise PydanticCustomError("recipe", message, {"said": f"{value:g}"})
    return float(value)


def _percent(share: float) -> str:
    """`0.03` as `3%`, without a digit lost or made up."""
    percent = f"{Decimal(repr(share)) * 100:f}"
    return f"{percent.rstrip('0').rstrip('.') if '.' in percent else percent}%"


Share = Annotated[
    float,
    BeforeValidator(_share),
    PlainSerializer(_percent, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": rf"^\s*{_PERCENT}\s*$"},
                {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            ]
        }
    ),
]
"""A part of a whole: `3%` or 0.03, held as 0.03."""


@dataclass(frozen=True)
class Size:
    """A size in bytes, or as a share of the original's; exactly one of them is given."""

    bytes: int | None = None
    share: float | None = None

    def of(self, original: int) -> int:
        """The size in bytes, given that of the original."""
        return self.bytes if self.bytes is not None else int((self.share or 0.0) * original)


def _count(value: Any) -> int:
    # Of a whole text only: pydantic would read `30%` as 30 bytes.
    if isinstance(value, str) and re.fullmatch(_AMOUNT, value.strip()):
        value = int(_bytes.validate_python(value.strip()))
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST:
        raise PydanticCustomError("recipe", "Input should be bytes, or a size such as 3.5GiB or 500MB")
    return value


Bytes = Annotated[
    int,
    BeforeValidator(_count),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": rf"^\s*{_AMOUNT}\s*$"}, {"type": "integer", "minimum": 1}]}
    ),
]
"""Bytes, `3.5GiB` or `500MB`, held as bytes."""


def _size(value: Any) -> Size:
    if isinstance(value, str) and re.fullmatch(_PERCENT, value.strip()):
        return Size(share=_share(value))
    try:
        return Size(bytes=_count(value))
    except PydanticCustomError:
        message = "Input should be bytes, or a size such as 3.5GiB, 500MB or 30%"
        raise PydanticCustomError("recipe", message) from None


def _plain_size(size: Size) -> int | str | None:
    return size.bytes if size.share is None else _percent(size.share)


SizeLimit = Annotated[
    Size,
    PlainValidator(_size),
    PlainSerializer(_plain_size, when_used="json"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": rf"^\s*(?:{_PERCENT}|{_AMOUNT})\s*$"},
                {"type": "integer", "minimum": 1},
            ]
        }
    ),
]
"""Bytes, `3.5GiB`, `500MB`, or a share of the original such as `30%`."""


@dataclass(frozen=True)
class Kept:
    """How much of something is kept: a number, or a share of what there is; exactly one of them is given."""

    count: int | None = None
    share: float | None = None

    def of(self, total: int, step: int = 1) -> int:
        """How many of `total` that are; a share gives the nearest multiple of `step`, at least one."""
        if self.count is not None:
            return self.count
        return max(1, round((self.share or 0.0) * total / step)) * step

    def __str__(self) -> str:
        return str(self.count) if self.share is None else _percent(self.share)


def _kept(value: Any) -> Kept:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}", value.strip()):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST:
        return Kept(count=value)
    try:
        share = _share(value)
    except PydanticCustomError:
        share = 0.0
    if not 0 < share <= 1:
        raise PydanticCustomError("recipe", "Input should be a number of at least 1, or a share such as 75%")
    return Kept(share=share)


Amount = Annotated[
    Kept,
    PlainValidator(_kept),
    PlainSerializer(lambda kept: kept.count if kept.share is None else _percent(kept.share), when_used="json"),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": rf"^\s*(?:{_PERCENT}|[0-9]+)\s*$"}, {"type": "number", "minimum": 0}]}
    ),
]
"""A number of things, or a share of them such as `75%`."""


__all__ = ["Amount", "Bytes", "Kept", "Share", "Size", "SizeLimit"]
