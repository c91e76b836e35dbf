"""What the formats of llmshrink's own have in common: settings that name every matrix, and flat bytes.

A matrix is stored as flat bytes under its own name, and what they need to be decoded beside them: a loader that does
not know the format fails at the shape, and does not fill in random weights. transformers loads them once llmshrink is
imported (`llmshrink.plugin`), which asks for a matrix's structure by its entry in the settings.

Codes may be entropy-coded once all of a model is written: then `packed` in the settings says which tensors are, and
their bytes. They are plain again as soon as they are read, and `format_version` is another.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmshrink.formats import entropy
from llmshrink.formats.base import Format, Rows, Slot
from llmshrink.forms import Dense, Form, Layer, decode

METHOD = "llmshrink"  # the `quant_method` of all of them
VERSION, PACKED_VERSION = 1, 2
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

    @property
    def reads_rows(self) -> bool:
        """Whether rows are decoded without all others."""
        return type(self).read_rows is not OwnFormat.read_rows

    def codes(self, key: str, entry: Entry) -> dict[str, int]:
        """The tensors of the matrix `key` that are flat codes, by their names, with the bits of a code."""
        return {}

    def code_bits(self, config: dict[str, Any]) -> dict[str, int]:
        """The same of all matrices in the settings."""
        found: dict[str, int] = {}
        for name, entry in config["layers"].items():
            found |= self.codes(f"{name}.weight", entry)
        return found

    def opened(self, name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
        """A tensor that the settings call packed, as it is without that; on its device.

        Raises:
            ValueError: it is damaged, or has no codes; nothing larger than the settings say is ever made.
        """
        owner = name[: name.rindex(".weight")]
        entry = _entry(config, owner)
        bits = self.codes(f"{owner}.weight", entry).get(name)
        if bits is None:
            raise ValueError(f"{name} is said to be packed, and has no codes")
        shape = tuple(int(n) for n in entry["shape"])
        slot = Slot(f"{owner}.weight", owner, (shape[0], shape[1]), getattr(torch, entry["dtype"]))
        return entropy.unpack(tensor, bits, len(self.pack(slot, self.meta(entry))[name]))

    def _plain(self, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Callable[[str], Tensor]:
        """What gives the tensors that `get` returns as they are where none is packed; each is opened once."""
        packed = packed_bytes(config)
        if config is None or not packed:
            return get
        opened = cache(lambda name: self.opened(name, get(name), config))
        return lambda name: opened(name) if name in packed else get(name)

    def factored(self, entry: Entry) -> bool:
        """Whether inputs are multiplied with what is stored, and nothing is decoded for it."""
        return False

    def reader(
        self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> Callable[[Rows], Tensor]:
        """What decodes rows of a matrix to float32."""
        entry, get = _entry(config, slot.name), self._plain(get, config)

        def read(rows: Rows) -> Tensor:
            numbers = torch.arange(slot.shape[0])[rows] if isinstance(rows, slice) else rows
            return decode(self.read_rows(slot.key, entry, get, numbers.to(get(slot.key).device)))

        return read

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """The form, as the settings describe it."""
        return self.read(slot.key, _entry(config, slot.name), self._plain(get, config))

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
        version, packed = (config or {}).get("format_version"), (config or {}).get("packed")
        if version != (PACKED_VERSION if packed else VERSION):
            return f"version {version!r} is not known"
        if packed and packed.get("codec") != entropy.CODEC:
            return f"codes packed as {packed.get('codec')!r} are not known"
        return None

    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype as the settings say them."""
        entry = _entry(config, key.removesuffix(".weight"))
        return tuple(entry["shape"]), getattr(torch, entry["dtype"])


def dtype_name(dtype: torch.dtype) -> str:
    """As settings have it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def packed_bytes(config: dict[str, Any] | None) -> dict[str, int]:
    """The tensors that are packed, by their names, with their bytes."""
    found: dict[str, int] = ((config or {}).get("packed") or {}).get("bytes", {})
    return found


def packed_config(config: dict[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The settings of the same model where the tensors `sizes` names are packed, with their bytes."""
    if not sizes:
        return config
    packed = {"codec": entropy.CODEC, "bytes": dict(sorted(sizes.items()))}
    return {**config, "format_version": PACKED_VERSION, "packed": packed}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _entry(config: dict[str, Any] | None, name: str) -> Entry:
    found: Entry = (config or {})["layers"][name]
    return found
