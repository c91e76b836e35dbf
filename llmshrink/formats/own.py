"""What the formats of llmshrink's own have in common: settings that name every matrix, and flat bytes.

A matrix is stored as flat bytes under its own name, and what they need to be decoded beside them: a loader that does
not know the format fails at the shape, and does not fill in random weights. transformers loads them once llmshrink is
imported (`llmshrink.plugin`), which asks for a matrix's structure by its entry in the settings.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmshrink.formats.base import Format, Rows, Slot
from llmshrink.forms import Dense, Form, Layer, decode

METHOD = "llmshrink"  # the `quant_method` of all of them
VERSION = 1
Entry = dict[str, Any]


class OwnFormat(Format):
    """A format that transformers reads with llmshrink."""

    quant_method: ClassVar[str | None] = METHOD

    @abstractmethod
    def describe(self, layer: Layer) -> Entry:
        """What must be known of a matrix to decode it, beside its module, shape and dtype."""

    @abstractmethod
    def meta(self, entry: Entry) -> Layer:
        """The structure of a matrix on the `meta` device, from its entry in the settings."""

    @abstractmethod
    def read(self, key: str, entry: Entry, get: Callable[[str], Tensor]) -> Form:
        """The form behind the tensors of the matrix `key`."""

    def read_rows(self, key: str, entry: Entry, get: Callable[[str], Tensor], rows: Tensor) -> Form:
        """The form of some rows of the matrix `key`, by their numbers (int64 [n]); others need not be decoded."""
        return Dense(decode(self.read(key, entry, get))[rows])

    def factored(self, entry: Entry) -> bool:
        """Whether inputs are multiplied with what is stored, and nothing is decoded for it."""
        return False

    def reader(
        self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> Callable[[Rows], Tensor]:
        """What decodes rows of a matrix to float32."""
        entry = _entry(config, slot.name)

        def read(rows: Rows) -> Tensor:
            numbers = torch.arange(slot.shape[0])[rows] if isinstance(rows, slice) else rows
            return decode(self.read_rows(slot.key, entry, get, numbers.to(get(slot.key).device)))

        return read

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """The form, as the settings describe it."""
        return self.read(slot.key, _entry(config, slot.name), get)

    def config(
        self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str], dtype: torch.dtype
    ) -> dict[str, Any] | None:
        """What each matrix needs to be decoded, by its name on disk."""
        return {
            "quant_method": self.quant_method,
            "format": self.name,
            "format_version": VERSION,
            "layers": {
                slot.name: {
                    "module": slot.module,
                    "shape": list(slot.shape),
                    "dtype": dtype_name(slot.dtype),
                    **self.describe(layer),
                }
                for slot, layer in layers
            },
        }

    def owns(self, config: dict[str, Any]) -> bool:
        """Whether a `quantization_config` is of this format."""
        return super().owns(config) and config.get("format") == self.name

    def cannot_read(self, config: dict[str, Any] | None) -> str | None:
        """Why it cannot be decoded here, or None."""
        version = (config or {}).get("format_version")
        return None if version == VERSION else f"version {version!r} is not known"

    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype as the settings say them."""
        entry = _entry(config, key.removesuffix(".weight"))
        return tuple(entry["shape"]), getattr(torch, entry["dtype"])


def dtype_name(dtype: torch.dtype) -> str:
    """As settings have it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _entry(config: dict[str, Any] | None, name: str) -> Entry:
    found: Entry = (config or {})["layers"][name]
    return found
