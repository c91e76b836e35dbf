"""Plain weights in the checkpoint's own dtype: every runtime loads them, and nothing is smaller on disk.

What pruning and fake-quantization studies need, and the way out when no loader knows the compressed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmshrink.formats.base import Format, Slot
from llmshrink.forms import Dense, Form, Layer, decode


class DenseFormat(Format):
    """Decoded weights under their own names."""

    name: ClassVar[str] = "dense"
    quant_method: ClassVar[str | None] = None

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Everything can be stored dense."""
        return None

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """The decoded matrix, rounded to the checkpoint's dtype, in the disk's own order."""
        weight = decode(layer.weight).to(slot.dtype)
        return {slot.key: weight.T.contiguous() if slot.transposed else weight}

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """The matrix as [out, in]."""
        weight = get(slot.key)
        return Dense(weight.T if slot.transposed else weight)

    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """What the tensor is."""
        weight = get(key)
        return tuple(weight.shape), weight.dtype


FORMAT = DenseFormat()
