"""GPTQ files (version 1), as AutoGPTQ wrote them and transformers, vLLM and ExLlama read them.

A matrix `X.weight` [out, in] in groups of g inputs becomes
    X.qweight   int32 [in * bits / 32, out], codes in [0, 2^bits), packed densely along the inputs
    X.qzeros    int32 [in / g, out * bits / 32], zero points LESS ONE, packed along the outputs
    X.scales    float16 [in / g, out]
    X.g_idx     int32 [in], the group of each input
and W = scale * (code - zero). Symmetric codes have the zero point 2^(bits-1). A zero point of 0 has no place in version
1 (less one, it would borrow from its neighbour): such a group is turned round, s (q - 0) = -s ((m - q) - m) with
m = 2^bits - 1, which changes no weight. Version 2 (`gptq_v2`) holds zero points as they are; it is read too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmshrink import __version__
from llmshrink.errors import InputError
from llmshrink.formats import bits as bitpack
from llmshrink.formats.base import Format, Slot
from llmshrink.forms import Dense, Form, Layer, Quantized

WORD = 32  # bits
IN_BLOCK = re.compile(r"(?P<block>.*?\.\d+)\.(?P<name>.+)")


class Gptq(Format):
    """Integer codes packed along the inputs, float16 scales."""

    name: ClassVar[str] = "gptq"
    quant_method: ClassVar[str | None] = "gptq"
    parts: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales", ".g_idx")
    marks: ClassVar[tuple[str, ...]] = (".qweight",)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Readers hold scales in float16, whatever the model's dtype."""
        return torch.float16

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Codes on an even grid in groups of adjacent inputs; both sides fill whole words."""
        form = layer.weight
        scheme = form.scheme if isinstance(form, Quantized) and isinstance(form.scale, Dense) else None
        if scheme is None or scheme.kind != "int" or scheme.whole:
            return "it stores integer codes with one scale per row or per group of adjacent inputs"
        if any(size * scheme.bits % WORD for size in slot.shape):
            return (
                f"it packs {scheme.bits}-bit codes into whole words of 32 bits, which {list(slot.shape)} does not fill"
            )
        return None

    def check_all(self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str]) -> str | None:
        """Loaders learn which linears of a block are compressed once, for all blocks."""
        if len({layer.scheme for _, layer in layers}) > 1:
            return "it has one scheme for all layers"
        blocks: dict[str, set[str]] = {}
        for slot, _ in layers:
            found = IN_BLOCK.fullmatch(slot.module)
            if found is None:
                return f"{slot.module} lies outside the blocks"
            blocks.setdefault(found["name"], set()).add(found["block"])
        for module in left:
            found = IN_BLOCK.fullmatch(module)
            if found is not None and found["block"] not in set().union(*blocks.values()):
                return f"all of {found['block']} is left as it is"
        partly = [name for name, found in blocks.items() if found != set().union(*blocks.values())]
        return f"{partly[0]} is compressed in some blocks and not in others" if partly else None

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Codes, zero points, scales and the group of each input."""
        form = layer.weight
        assert isinstance(form, Quantized) and isinstance(form.scale, Dense) and form.scheme is not None
        group = form.scheme.group_size or slot.shape[1]
        codes, zeros, scales = _version_1(form, group)
        groups = torch.arange(slot.shape[1], dtype=torch.int32, device=codes.device) // group
        tensors = {
            "qweight": bitpack.pack(codes, form.bits).T,
            "qzeros": bitpack.pack((zeros - 1).T.contiguous(), form.bits),
            "scales": scales.to(torch.float16).T,
            "g_idx": groups,
        }
        return {f"{slot.name}.{name}": tensor.contiguous() for name, tensor in tensors.items()}

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """Codes and scales; the decoded matrix where groups are not of adjacent inputs (`desc_act`)."""
        assert config is not None
        bits, (out, width) = int(config["bits"]), slot.shape
        codes = bitpack.unpack(get(f"{slot.name}.qweight").T.contiguous(), bits, width)
        zeros = bitpack.unpack(get(f"{slot.name}.qzeros"), bits, out).T
        if config.get("checkpoint_format", config.get("format", "gptq")) != "gptq_v2":
            zeros = (zeros + 1) & ((1 << bits) - 1)
        scales = get(f"{slot.name}.scales").T.contiguous()
        signed, zero = bitpack.signed(codes, bits), bitpack.signed(zeros.contiguous(), bits)
        group = int(config["group_size"]) if int(config["group_size"]) > 0 else width
        _check_version(slot, zero, bits, config)
        order = _groups(slot, get, group, scales.shape[1])
        if order is not None:
            return Dense(bitpack.decode_scattered(signed, scales, zero, order))
        return Quantized(signed, Dense(scales), zero if zero.any() else None, None, (1, group), bits)

    def config(
        self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str], dtype: torch.dtype
    ) -> dict[str, Any] | None:
        """One scheme for all; the linears of a block are named where some of them are left."""
        given = list(layers)
        scheme = given[0][1].scheme
        assert scheme is not None
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "desc_act": False,
            "sym": scheme.symmetric,
            "checkpoint_format": "gptq",
            "format": "gptq",
            "lm_head": False,
            "pack_dtype": "int32",
            "damp_percent": 0.01,
            "true_sequential": True,
            "meta": {"quantizer": [f"llmshrink:{__version__}"]},
        }
        if any(IN_BLOCK.fullmatch(module) for module in left):
            names = dict.fromkeys(found["name"] for slot, _ in given if (found := IN_BLOCK.fullmatch(slot.module)))
            config["modules_in_block_to_quantize"] = [list(names)]
        return config

    def files(self, config: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
        """The same settings once more, where AutoGPTQ and older loaders look for them."""
        return {"quantize_config.json": config or {}}

    def cannot_read(self, config: dict[str, Any] | None) -> str | None:
        """Codes of 2, 3, 4 or 8 bits, packed densely."""
        if config is None or config.get("bits") not in (2, 3, 4, 8):
            return "only codes of 2, 3, 4 or 8 bits are read"
        if config.get("dynamic"):
            return "settings for single layers (`dynamic`) are not read"
        if config.get("pack_dtype", "int32") != "int32":
            return "only words of 32 bits (`pack_dtype`) are read"
        version = config.get("checkpoint_format", config.get("format", "gptq"))
        return None if version in ("gptq", "gptq_v2") else f"its variant {version!r} is not read"

    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape from the packed codes, dtype from the scales."""
        assert config is not None
        name = key.removesuffix(".weight")
        words, out = get(f"{name}.qweight").shape
        return (out, words * WORD // int(config["bits"])), get(f"{name}.scales").dtype


def _version_1(form: Quantized, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in] and zero points [out, groups] as uint8, the latter at least 1, and scales."""
    assert isinstance(form.scale, Dense)
    middle = 1 << form.bits - 1
    scales = form.scale.weight
    codes = bitpack.unsigned(form.codes, form.bits)
    if form.zero is None:
        return codes, torch.full_like(scales, middle, dtype=torch.uint8), scales
    zeros = bitpack.unsigned(form.zero, form.bits)
    turned = zeros == 0
    most = 2 * middle - 1
    inside = turned.repeat_interleave(group, 1)
    return (
        torch.where(inside, most - codes, codes),
        torch.where(turned, most, zeros),
        torch.where(turned, -scales, scales),
    )


def _check_version(slot: Slot, zero: Tensor, bits: int, config: dict[str, Any]) -> None:
    """Refuse zero points that are all one off: the file is of the other version than its settings say."""
    if config.get("sym") and bits > 2 and bool((zero == zero.flatten()[0]).all()) and abs(int(zero.flatten()[0])) == 1:
        raise InputError(
            f"{slot.key}: its zero points are off by one for symmetric codes. The settings name the wrong version: "
            "`checkpoint_format` is gptq or gptq_v2."
        )


def _groups(slot: Slot, get: Callable[[str], Tensor], group: int, count: int) -> Tensor | None:
    """The group of each input, or None where adjacent inputs share one."""
    name = f"{slot.name}.g_idx"
    try:
        stored = get(name)
    except KeyError:
        return None
    return bitpack.scattered(stored, group, count, name)


FORMAT = Gptq()
