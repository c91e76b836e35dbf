"""compressed-tensors: what vLLM runs and transformers reads.

`pack-quantized`, integer codes alone: a matrix `X.weight` [out, in] becomes
    X.weight_packed      int32 [out, ceil(in * bits / 32)], codes + 2^(bits-1), packed densely along each row
    X.weight_scale       [out, groups], in the checkpoint's dtype
    X.weight_zero_point  int32 [ceil(out * bits / 32), groups], asymmetric only, packed along the rows
    X.weight_shape       int64 [2]
    X.weight_g_idx       int32 [in], the group of each input: read only, older releases wrote it (`actorder: "group"`)
and W = scale * (code - zero). Tried against compressed-tensors 0.20 with transformers 5.23: asymmetric codes, and
linears of a class of their own, load only with `"dequantize": true`.

`int-quantized` and `float-quantized`, 8-bit codes whose inputs are rounded too (`naive-quantized`: without that):
    X.weight         int8 or float8_e4m3fn [out, in], the codes as they are
    X.weight_scale   [out, 1], or [1] for the whole matrix, in the checkpoint's dtype
    X.input_scale    [1], static inputs only; dynamic ones get a scale for each token while the model runs
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
from llmshrink.forms import CodeKind, Dense, Form, InputKind, InputScheme, Layer, Quantized, Scheme

LAYOUT_VERSION = "0.18.0"  # the oldest release that reads 3-bit codes laid out like this
PACKED = "pack-quantized"
ROUNDED: dict[CodeKind, str] = {"int": "int-quantized", "float": "float-quantized"}  # with inputs of the same kind
PLAIN = "naive-quantized"  # codes that are not packed
BITS = (2, 3, 4, 8)  # whose layout every release since 0.18 reads alike, and runtimes have kernels for


class CompressedTensors(Format):
    """Integer codes packed along each row; 8-bit codes as they are, where inputs are rounded to 8 bits too."""

    name: ClassVar[str] = "compressed-tensors"
    quant_method: ClassVar[str | None] = "compressed-tensors"
    parts: ClassVar[tuple[str, ...]] = (
        *(".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
        *(".weight", ".input_scale"),
    )
    marks: ClassVar[tuple[str, ...]] = (".weight_packed", ".weight_scale")
    rounded_inputs: ClassVar[tuple[InputKind, ...]] = ("int", "float")

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Codes under one scale per row, per group of adjacent inputs, or for all; with rounded inputs, 8-bit codes."""
        form, scheme = layer.weight, layer.scheme
        if not isinstance(form, Quantized) or form.levels is not None:
            return "it stores codes under scales, not level tables such as NF4; use format bnb or dense"
        if scheme is None or not isinstance(form.scale, Dense):
            return "it stores one scale per row or per group of adjacent inputs"
        if scheme.bits not in BITS:
            return f"it stores codes of {', '.join(map(str, BITS))} bits, not of {scheme.bits}"
        if scheme.inputs is None:
            return None
        kind, _ = scheme.inputs
        if (scheme.kind, scheme.bits, scheme.symmetric, scheme.group_size) == (kind, 8, True, None):
            return None
        return (
            "rounded inputs go with symmetric 8-bit codes of their own kind without groups: inputs int8 with bits 8 "
            "and group_size -1, inputs fp8 with method fp8"
        )

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Codes and scales; zeros where asymmetric, the shape where packed, the scale of static inputs."""
        form, scheme = layer.weight, layer.scheme
        assert isinstance(form, Quantized)
        assert isinstance(form.scale, Dense)
        assert scheme is not None
        scale = form.scale.weight
        if _layout(scheme) != PACKED:
            tensors = {
                f"{slot.name}.weight": form.codes,
                f"{slot.name}.weight_scale": scale.view(1) if scheme.whole else scale,
            }
            if form.zero is not None:
                tensors[f"{slot.name}.weight_zero_point"] = form.zero.view(1) if scheme.whole else form.zero
            if layer.input is not None and layer.input.scale is not None:
                tensors[f"{slot.name}.input_scale"] = layer.input.scale
            return tensors
        tensors = {
            f"{slot.name}.weight_packed": bitpack.pack(bitpack.unsigned(form.codes, form.bits), form.bits),
            f"{slot.name}.weight_scale": scale,
            f"{slot.name}.weight_shape": torch.tensor(slot.shape, dtype=torch.int64),
        }
        if form.zero is not None:
            packed = bitpack.pack(bitpack.unsigned(form.zero, form.bits).T.contiguous(), form.bits)
            tensors[f"{slot.name}.weight_zero_point"] = packed.T.contiguous()
        return tensors

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """Codes and scales by the scheme of this module; the decoded matrix where groups are not of adjacent inputs."""
        group = _find_group(config or {}, slot.module, slot.name)
        scheme = _read(group["weights"])
        out, width = slot.shape
        size = scheme.group_size or width
        scale = get(f"{slot.name}.weight_scale")
        zero = _zero_points(slot, get, scheme, out)
        if (group.get("format") or (config or {}).get("format")) != PACKED:
            if scheme.whole:
                zero = None if zero is None else zero.view(1, 1)
                return Quantized(get(slot.key), Dense(scale.view(1, 1)), zero, None, (out, width), scheme.bits)
            return Quantized(get(slot.key), Dense(scale.view(out, -1)), zero, None, (1, size), scheme.bits)
        packed = get(f"{slot.name}.weight_packed")
        if packed.shape[1] != math.ceil(width * scheme.bits / 32):
            raise InputError(
                f"{slot.key}: {width} codes of {scheme.bits} bits lie in {packed.shape[1]} words of a row; the layout "
                f"of compressed-tensors before {LAYOUT_VERSION} is not read. Write it again with a newer release."
            )
        codes = bitpack.signed(bitpack.unpack(packed, scheme.bits, width), scheme.bits)
        groups = None
        if group["weights"].get("actorder") == "group":
            name = f"{slot.name}.weight_g_idx"
            groups = bitpack.scattered(get(name), size, scale.shape[1], name)
        if groups is not None:
            return Dense(bitpack.decode_scattered(codes, scale, zero, groups))
        return Quantized(codes, Dense(scale), zero, None, (1, size), scheme.bits)

    def unpack_input(
        self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> InputScheme | None:
        """How the inputs of this module are rounded, or None."""
        inputs = _find_group(config or {}, slot.module, slot.name).get("input_activations")
        if not inputs:
            return None
        scale = None if inputs.get("dynamic") else get(f"{slot.name}.input_scale").view(1)
        return InputScheme(inputs.get("type", "int"), scale)

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
                "input_activations": _inputs(scheme),
                "output_activations": None,
                "format": _layout(scheme),
            }
            for i, (scheme, modules) in enumerate(sorted(by_scheme.items(), key=lambda item: item[0].bits))
        }
        layouts = {_layout(scheme) for scheme in by_scheme}
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "version": LAYOUT_VERSION,
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
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
        """Experts of integers, and what it must dequantize: made dense while loading, in the dtype of the scales."""
        groups = (config or {}).get("config_groups", {}).values()
        floats = any(group["weights"].get("type") == "float" for group in groups)
        return (kind == "experts" and not floats) or bool((config or {}).get("dequantize"))

    def rounds_inputs(self, kind: Kind, config: dict[str, Any] | None) -> bool:
        """Those of linears that are not made dense while they are loaded."""
        return kind != "experts" and not (config or {}).get("dequantize")

    def cannot_read(self, config: dict[str, Any] | None) -> str | None:
        """Integers of any width and 8-bit floats, with or without inputs rounded to 8 bits."""
        for key in ("transform_config", "kv_cache_scheme"):
            if (config or {}).get(key):
                return f"what `{key}` asks for at run time is not done"
        known = {PACKED, PLAIN, *ROUNDED.values()}
        for group in (config or {}).get("config_groups", {}).values():
            layout = group.get("format") or (config or {}).get("format")
            if layout not in known:
                return f"only its formats {', '.join(sorted(known))} are read"
            weights, inputs = group.get("weights") or {}, group.get("input_activations")
            codes, strategy = (weights.get("type", "int"), weights.get("num_bits")), weights.get("strategy")
            if codes[0] != "int" and (codes != ("float", 8) or layout == PACKED):
                return "only integers and 8-bit floats are read"
            if strategy not in ("group", "channel") and (strategy != "tensor" or layout == PACKED):
                return "only weights with scales per group or channel are read, or per tensor where they are not packed"
            if group.get("output_activations"):
                return "rounded outputs are not read"
            if inputs and not _is_known(inputs):
                return "only inputs rounded to 8 bits, symmetric, per token or with one static scale, are read"
        return None if (config or {}).get("config_groups") else "it says nothing of how weights are stored"

    def dense_names(self, stored: Iterable[str]) -> dict[str, str]:
        """For each matrix: its dense key -> the tensor of its codes, packed or as they are."""
        names = set(stored)
        keys = sorted(super().dense_names(names))
        return {key: f"{key}_packed" if f"{key}_packed" in names else key for key in keys}

    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape from the codes, or from the tensor that holds it; dtype from the scales."""
        dtype = get(f"{key}_scale").dtype
        try:
            return tuple(get(key).shape), dtype
        except KeyError:
            return tuple(int(n) for n in get(f"{key}_shape")), dtype


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


def _layout(scheme: Scheme) -> str:
    """What compressed-tensors calls the way in which such codes lie in a file."""
    if scheme.inputs is not None:
        return ROUNDED[scheme.kind]
    return PLAIN if scheme.kind == "float" or scheme.whole else PACKED


def _weights(scheme: Scheme) -> dict[str, Any]:
    """The entry `weights` of a config group."""
    strategy: dict[str, Any] = {"strategy": "tensor" if scheme.whole else "channel"}
    if scheme.group_size:
        strategy = {"strategy": "group", "group_size": scheme.group_size}
    return {"num_bits": scheme.bits, "type": scheme.kind, "symmetric": scheme.symmetric, **strategy, "dynamic": False}


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    """The entry `input_activations` of a config group."""
    if scheme.inputs is None:
        return None
    kind, scales = scheme.inputs
    how = {"strategy": "token", "dynamic": True} if scales == "dynamic" else {"strategy": "tensor", "dynamic": False}
    return {"num_bits": 8, "type": kind, "symmetric": True, **how}


def _is_known(inputs: dict[str, Any]) -> bool:
    """Whether inputs are rounded in a way that `InputScheme` describes."""
    how = (inputs.get("strategy", "tensor"), inputs.get("dynamic", False))
    eight = inputs.get("num_bits", 8) == 8 and inputs.get("type", "int") in ROUNDED and inputs.get("symmetric", True)
    return bool(eight) and how in (("token", True), ("tensor", False))


def _read(weights: dict[str, Any]) -> Scheme:
    strategy = weights.get("strategy")
    group = weights.get("group_size") if strategy == "group" else None
    kind = weights.get("type", "int")
    return Scheme(int(weights["num_bits"]), bool(weights.get("symmetric", True)), group, kind, strategy == "tensor")


def _find_group(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """The config group of a module: of one of its names first, of a pattern next, then of the class `Linear`."""
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
        found: dict[str, Any] = min(ranked, key=lambda pair: pair[0])[1]
        return found
    raise InputError(f"quantization_config in config.json says nothing about {names[0]}, whose weight is compressed.")


FORMAT = CompressedTensors()
