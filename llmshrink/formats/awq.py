"""AWQ files (`gemm`), as AutoAWQ wrote them and gptqmodel and vLLM read them.

A matrix `X.weight` [out, in] in groups of g inputs becomes
    X.qweight   int32 [in, out / 8], eight 4-bit codes of adjacent outputs in a word, in the order ORDER
    X.qzeros    int32 [in / g, out / 8], zero points in the same order
    X.scales    float16 [in / g, out]
and W = scale * (code - zero), all unsigned. What AWQ does to the weights beforehand, scaling channels against each
other, is folded into other tensors: any 4-bit codes in groups can be stored like this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmshrink.formats import bits as bitpack
from llmshrink.formats.base import Format, Slot
from llmshrink.forms import Dense, Form, Layer, Quantized

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds output 8 c + ORDER[i]
WORD = len(ORDER)


class Awq(Format):
    """4-bit codes and zero points packed along the outputs, float16 scales."""

    name: ClassVar[str] = "awq"
    quant_method: ClassVar[str | None] = "awq"
    parts: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales")
    marks: ClassVar[tuple[str, ...]] = (".qweight",)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Readers hold scales in float16, whatever the model's dtype."""
        return torch.float16

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """4-bit codes in groups of adjacent inputs; outputs fill whole words."""
        form = layer.weight
        if not isinstance(form, Quantized) or form.scheme is None or not isinstance(form.scale, Dense):
            return "it stores integer codes with one scale per group of adjacent inputs"
        if form.bits != BITS:
            return "it stores 4-bit codes"
        return (
            None
            if slot.shape[0] % WORD == 0
            else f"it packs {WORD} outputs in a word; {slot.shape[0]} do not fill them"
        )

    def check_all(self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str]) -> str | None:
        """One group size for all layers."""
        return "it has one scheme for all layers" if len({layer.scheme for _, layer in layers}) > 1 else None

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Codes, zero points, scales."""
        form = layer.weight
        assert isinstance(form, Quantized) and isinstance(form.scale, Dense)
        scales = form.scale.weight
        zero = torch.zeros_like(scales, dtype=torch.int8) if form.zero is None else form.zero
        tensors = {
            "qweight": _pack(bitpack.unsigned(form.codes, BITS)),
            "qzeros": _pack(bitpack.unsigned(zero, BITS)),
            "scales": scales.to(torch.float16).T.contiguous(),
        }
        return {f"{slot.name}.{name}": tensor for name, tensor in tensors.items()}

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """Codes, zero points and scales as [out, in]."""
        scales = get(f"{slot.name}.scales").T.contiguous()
        codes, zero = (bitpack.signed(_unpack(get(f"{slot.name}.{n}")), BITS) for n in ("qweight", "qzeros"))
        group = slot.shape[1] // scales.shape[1]
        return Quantized(codes, Dense(scales), zero if zero.any() else None, None, (1, group), BITS)

    def config(
        self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str], dtype: torch.dtype
    ) -> dict[str, Any] | None:
        """One group size for all; modules that are left are named."""
        _, layer = next(iter(layers))
        assert layer.scheme is not None
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": layer.scheme.group_size or -1,
            "zero_point": True,
            "modules_to_not_convert": sorted(left),
        }

    def cannot_read(self, config: dict[str, Any] | None) -> str | None:
        """Only the layout `gemm`, of 4 bits with zero points."""
        settings = config or {}
        if settings.get("bits", settings.get("w_bit", BITS)) != BITS:
            return "only codes of 4 bits are read"
        if not settings.get("zero_point", True):
            return "only codes with zero points are read"
        version = (config or {}).get("version", (config or {}).get("format", "gemm"))
        return None if str(version).lower() == "gemm" else f"its layout {version!r} is not read"

    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape from the packed codes, dtype from the scales."""
        name = key.removesuffix(".weight")
        width, words = get(f"{name}.qweight").shape
        return (words * WORD, width), get(f"{name}.scales").dtype


def _pack(codes: Tensor) -> Tensor:
    """uint8 [out, n] -> int32 [n, out / 8]."""
    n = codes.shape[1]
    return bitpack.pack(codes.T.reshape(n, -1, WORD)[:, :, list(ORDER)].reshape(n, -1), BITS)


def _unpack(packed: Tensor) -> Tensor:
    """int32 [n, out / 8] -> uint8 [out, n]."""
    n, words = packed.shape
    back = [ORDER.index(i) for i in range(WORD)]
    return bitpack.unpack(packed, BITS, words * WORD).view(n, words, WORD)[:, :, back].reshape(n, -1).T.contiguous()


FORMAT = Awq()
