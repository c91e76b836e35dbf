"""compressed-tensors `pack-quantized`: what vLLM runs and transformers reads.

A matrix `X.weight` [out, in] becomes
    X.weight_packed      int32 [out, ceil(in * bits / 32)], codes + 2^(bits-1), packed densely along each row
    X.weight_scale       [out, groups], in the checkpoint's dtype
    X.weight_zero_point  int32 [ceil(out * bits / 32), groups], asymmetric only, packed along the rows
    X.weight_shape       int64 [2]
    X.weight_g_idx       int32 [in], the group of each input: read only, older releases wrote it (`actorder: "group"`)
and W = scale * (code - zero). Tried against compressed-tensors 0.20 with transformers 5.23: asymmetric codes, and
linears of a class of their own, load only with `"dequantize": true`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmshrink import patterns
from llmshrink.errors import InputError
from llmshrink.formats import bits as bitpack
from llmshrink.formats.base import Format, Kind, Slot
from llmshrink.forms import Dense, Form, Layer, Quantized, Scheme

LAYOUT_VERSION = "0.18.0"  # the oldest release that reads 3-bit codes laid out like this


class CompressedTensors(Format):
    """Integer codes packed along each row."""

    name: ClassVar[str] = "compressed-tensors"
    quant_method: ClassVar[str | None] = "compressed-tensors"
    parts: ClassVar[tuple[str, ...]] = (
        *(".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
    )
    marks: ClassVar[tuple[str, ...]] = (".weight_packed",)

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Codes on an even grid, one scale per row or per group of adjacent inputs."""
        form = layer.weight
        if not isinstance(form, Quantized) or form.levels is not None:
            return "it stores integer codes under scales, not level tables such as NF4; use format bnb or dense"
        if isinstance(form.block, int) or form.block[0] != 1 or not isinstance(form.scale, Dense):
            return "it stores one scale per row or per group of adjacent inputs"
        return None

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Codes, scales and shape; zeros where asymmetric."""
        form = layer.weight
        assert isinstance(form, Quantized)
        assert isinstance(form.scale, Dense)
        tensors = {
            f"{slot.name}.weight_packed": bitpack.pack(bitpack.unsigned(form.codes, form.bits), form.bits),
            f"{slot.name}.weight_scale": form.scale.weight,
            f"{slot.name}.weight_shape": torch.tensor(slot.shape, dtype=torch.int64),
        }
        if form.zero is not None:
            packed = bitpack.pack(bitpack.unsigned(form.zero, form.bits).T.contiguous(), form.bits)
            tensors[f"{slot.name}.weight_zero_point"] = packed.T.contiguous()
        return tensors

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """Codes and scales by the scheme of this module; the decoded matrix where groups are not of adjacent inputs."""
        weights = _find_weights(config or {}, slot.module, slot.name)
        scheme = _read(weights)
        out, width = slot.shape
        group = scheme.group_size or width
        packed = get(f"{slot.name}.weight_packed")
        if packed.shape[1] != math.ceil(width * scheme.bits / 32):
            raise InputError(
                f"{slot.key}: {width} codes of {scheme.bits} bits lie in {packed.shape[1]} words of a row; the layout "
                f"of compressed-tensors before {LAYOUT_VERSION} is not read. Write it again with a newer release."
            )
        codes = bitpack.signed(bitpack.unpack(packed, scheme.bits, width), scheme.bits)
        scale = get(f"{slot.name}.weight_scale")
        zero = _zero_points(slot, get, scheme, out)
        groups = None
        if weights.get("actorder") == "group":
            name = f"{slot.name}.weight_g_idx"
            groups = bitpack.scattered(get(name), group, scale.shape[1], name)
        if groups is not None:
            return Dense(bitpack.decode_scattered(codes, scale, zero, groups))
        return Quantized(codes, Dense(scale), zero, None, (1, group), scheme.bits)

    def config(
        self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str], dtype: torch.dtype
    ) -> dict[str, Any] | None:
        """One config group per scheme; the only one targets all linears but those left out."""
        by_scheme: dict[Scheme, list[str]] = {}
        dequantize = False
        for slot, layer in layers:
            scheme = layer.scheme
            assert scheme is not None
            dequantize |= not scheme.symmetric or slot.kind == "subclass"
            by_scheme.setdefault(scheme, []).append(slot.module)
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if len(by_scheme) == 1 else modules,
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for i, (scheme, modules) in enumerate(sorted(by_scheme.items(), key=lambda item: item[0].bits))
        }
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "version": LAYOUT_VERSION,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(left),
        }
        if dequantize:
            config["dequantize"] = True
        return config

    def other_config(self, config: dict[str, Any] | None) -> dict[str, Any] | None:
        """Made dense while loading: by one scheme for all layers, whatever the config says of each."""
        if config is None or config.get("dequantize") or len(config["config_groups"]) > 1:
            return None
        return {**config, "dequantize": True}

    def rounds(self, kind: Kind, config: dict[str, Any] | None) -> bool:
        """Experts, and whatever it must dequantize: these are made dense while loading, in the dtype of the scales."""
        return kind == "experts" or bool((config or {}).get("dequantize"))

    def cannot_read(self, config: dict[str, Any] | None) -> str | None:
        """Only packed integer weights without rounded inputs."""
        for key in ("transform_config", "kv_cache_scheme"):
            if (config or {}).get(key):
                return f"what `{key}` asks for at run time is not done"
        for group in (config or {}).get("config_groups", {}).values():
            weights = group.get("weights") or {}
            if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
                return "only integer weights with scales per group or channel are read"
            if group.get("input_activations"):
                return "rounded inputs are not read"
        packed = (config or {}).get("format") in ("pack-quantized", "mixed-precision")
        return None if packed else "only its format pack-quantized is read"

    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape from the tensor that holds it, dtype from the scales."""
        return tuple(int(n) for n in get(f"{key}_shape")), get(f"{key}_scale").dtype


def _zero_points(slot: Slot, get: Callable[[str], Tensor], scheme: Scheme, out: int) -> Tensor | None:
    """int8 [out, groups]; releases before 0.10 stored them like this, newer ones packed along the rows."""
    try:
        stored = get(f"{slot.name}.weight_zero_point")
    except KeyError:
        return None  # releases that left out what is zero everywhere
    if scheme.symmetric:
        if bool((stored != 0).any()):
            raise InputError(f"{slot.key}: it has zero points, and its settings say that it is symmetric.")
        return None
    if stored.dtype != torch.int32:
        return stored.to(torch.int8)
    return bitpack.signed(bitpack.unpack(stored.T.contiguous(), scheme.bits, out).T.contiguous(), scheme.bits)


def _weights(scheme: Scheme) -> dict[str, Any]:
    """The entry `weights` of a config group."""
    strategy = {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
    return {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, **strategy, "dynamic": False}


def _read(weights: dict[str, Any]) -> Scheme:
    group = weights.get("group_size") if weights.get("strategy") == "group" else None
    return Scheme(int(weights["num_bits"]), bool(weights.get("symmetric", True)), group)


def _find_weights(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """The entry `weights` for a module: of one of its names first, of a pattern next, then of the class `Linear`."""
    groups = list(config.get("config_groups", {}).values())
    ranked = []
    for group in groups:
        for target in group["targets"]:
            if target in names:
                ranked.append((0, group))
            elif target.startswith("re:") and any(patterns.matches(target[3:], name, whole=False) for name in names):
                ranked.append((1, group))
            elif target == "Linear":
                ranked.append((2, group))
    if ranked:
        found: dict[str, Any] = min(ranked, key=lambda pair: pair[0])[1]["weights"]
        return found
    raise InputError(f"quantization_config in config.json says nothing about {names[0]}, whose weight is packed.")


FORMAT = CompressedTensors()
