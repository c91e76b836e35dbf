"""GGUF's tensors: each matrix in a block type of ggml, or in plain floats.

A matrix `X.weight` [out, in] of type T becomes one tensor `X.weight.T`: for a block type uint8 [out, bytes of a row],
for F16, BF16 and F32 that dtype [out, in]. Which block type a form is follows from the form (`ggml.type_of`). How such
tensors are put together to one file is not said here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmshrink.block_types import BLOCK_TYPES
from llmshrink.errors import InputError
from llmshrink.formats import ggml
from llmshrink.formats.base import Format, Slot
from llmshrink.forms import Dense, Form, Layer, Quantized

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class Gguf(Format):
    """Blocks of adjacent inputs, as ggml computes with them."""

    name: ClassVar[str] = "gguf"
    quant_method: ClassVar[str | None] = "gguf"
    marks: ClassVar[tuple[str, ...]] = tuple(f".weight.{name}" for name in (*BLOCK_TYPES, *FLOATS))
    parts: ClassVar[tuple[str, ...]] = marks
    by_row: ClassVar[bool] = True

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """A block type, or plain floats."""
        if _type_of(layer.weight) is None:
            kinds = ", ".join((*BLOCK_TYPES, *FLOATS))
            return f"it stores the types {kinds}; the methods rtn and gptq make block types, cast makes floats"
        return None

    def type_of(self, layer: Layer) -> str | None:
        """The block type, or the float."""
        return _type_of(layer.weight)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Always float16."""
        return torch.float16

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """One tensor, named after its type."""
        form = layer.weight
        assert isinstance(form, Dense | Quantized)
        stored = form.weight if isinstance(form, Dense) else ggml.pack(form)
        return {f"{slot.key}.{_type_of(form)}": stored}

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """The form behind the tensor that is there."""
        name, stored = _find(slot.key, get)
        shape = _shape(name, stored)
        if shape != slot.shape:
            raise InputError(f"{slot.key}.{name}: it holds a matrix {list(shape)}, not {list(slot.shape)}.")
        return Dense(stored) if name in FLOATS else ggml.unpack(name, stored)

    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape from the bytes of a row; float16, the dtype of its scales, unless the type is a float itself."""
        name, stored = _find(key, get)
        return _shape(name, stored), FLOATS.get(name, torch.float16)


def _type_of(form: Form) -> str | None:
    if isinstance(form, Dense):
        return next((name for name, dtype in FLOATS.items() if dtype == form.weight.dtype), None)
    return ggml.type_of(form)


def _find(key: str, get: Callable[[str], Tensor]) -> tuple[str, Tensor]:
    """The type of a matrix, and its tensor.

    Raises:
        InputError: there is none, or it is not what its name says.
    """
    for name in (*BLOCK_TYPES, *FLOATS):
        try:
            stored = get(f"{key}.{name}")
        except KeyError:
            continue
        if stored.dim() != 2 or stored.dtype != FLOATS.get(name, torch.uint8):
            raise InputError(f"{key}.{name}: {stored.dtype} {list(stored.shape)} is no matrix of this type.")
        return name, stored
    raise InputError(f"{key}: no tensor of a known type stores it; the file is incomplete.")


def _shape(name: str, stored: Tensor) -> tuple[int, int]:
    """Shape [out, in] of the matrix in a tensor of this type."""
    out, width = stored.shape
    if name in FLOATS:
        return out, width
    kind = BLOCK_TYPES[name]
    if width % kind.bytes:
        raise InputError(f"a row of {width} bytes is not made of whole blocks of {name}, which have {kind.bytes}.")
    return out, width // kind.bytes * kind.size


FORMAT = Gguf()
