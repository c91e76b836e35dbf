"""BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764) as transformers stores it: read, never written.

A matrix `X.weight` [out, in] of codes in {-1, 0, 1} is
    X.weight         uint8 [out / 4, in], four codes + 1 a byte: that of row r + i * out / 4 at bit 2 i of row r
    X.weight_scale   [1], one for the whole matrix
W = code * weight_scale for `"linear_class": "autobitlinear"`, code / weight_scale for `bitlinear`, the default. Inputs
are rounded to 8 bits while the model runs. It is not written, because its loader computes with rounded inputs alone:
what it gives out cannot be compared with anything closely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmshrink.errors import InputError
from llmshrink.formats.base import Format, Kind, Slot
from llmshrink.forms import Dense, Form, InputScheme, Layer, Quantized

PER_BYTE = 4
BITS = 2


class BitNet(Format):
    """Ternary codes, four of different rows in a byte."""

    name: ClassVar[str] = "bitnet"
    quant_method: ClassVar[str | None] = "bitnet"
    parts: ClassVar[tuple[str, ...]] = (".weight", ".weight_scale")
    marks: ClassVar[tuple[str, ...]] = (".weight_scale",)

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Nothing is written, whatever the layer."""
        return "it is read, not written; compressed-tensors holds ternary codes"

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Nothing is written."""
        raise TypeError(self.check(slot, layer))

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """Codes, and the matrix's scale once for each row: so other formats can hold it."""
        packed, scale = get(slot.key), get(f"{slot.name}.weight_scale")
        if packed.dtype != torch.uint8 or scale.numel() != 1:
            raise InputError(f"{slot.key}: four codes in each uint8 and one scale were expected.")
        codes = torch.cat([packed >> BITS * i & 3 for i in range(PER_BYTE)])
        if bool((codes == 3).any()):
            raise InputError(f"{slot.key}: it has codes that are none of -1, 0 and 1; the file is damaged.")
        scale = scale.view(1, 1) if _multiplies(config) else 1 / scale.float().view(1, 1)
        table = Dense(scale.expand(len(codes), 1).contiguous())
        return Quantized(codes.view(torch.int8) - 1, table, None, None, (1, slot.shape[1]), BITS)

    def rounds_inputs(self, kind: Kind, config: dict[str, Any] | None) -> bool:
        """Always."""
        return True

    def unpack_input(
        self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> InputScheme | None:
        """Each token's inputs to 8 bits."""
        return InputScheme("bitnet")

    def config(
        self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str], dtype: torch.dtype
    ) -> dict[str, Any] | None:
        """Nothing is written."""
        raise TypeError("it is read, not written")

    def cannot_read(self, config: dict[str, Any] | None) -> str | None:
        """Packed codes, without norms inside of linears."""
        settings = config or {}
        if settings.get("quantization_mode", "offline") != "offline":
            return "only packed weights are read (quantization_mode offline), none that are rounded at run time"
        return "linears with a norm inside (use_rms_norm) are not read" if settings.get("use_rms_norm") else None

    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape from the packed codes, dtype from the scale."""
        rows, width = get(key).shape
        return (PER_BYTE * rows, width), get(f"{key.removesuffix('.weight')}.weight_scale").dtype


def _multiplies(config: dict[str, Any] | None) -> bool:
    return (config or {}).get("linear_class") == "autobitlinear"


FORMAT = BitNet()
