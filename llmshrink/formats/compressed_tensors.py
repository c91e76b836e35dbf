"""compressed-tensors `pack-quantized`: what vLLM runs and transformers reads.

A matrix `X.weight` [out, in] becomes
    X.weight_packed      int32 [out, ceil(in * bits / 32)], codes + 2^(bits-1), packed densely along each row
    X.weight_scale       [out, groups], in the checkpoint's dtype
    X.weight_zero_point  int32 [ceil(out * bits / 32), groups], asymmetric only, packed along the rows
    X.weight_shape       int64 [2]
and W = scale * (code - zero). Tried against compressed-tensors 0.20 with transformers 5.23: Conv1D models load with
random weights and no error, so they are refused here; asymmetric files load only with `"dequantize": true`, which
knows one scheme for the whole model and no fused experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmshrink.errors import InputError
from llmshrink.formats import bits as bitpack
from llmshrink.formats.base import Format, Slot
from llmshrink.forms import Dense, Form, Layer, Quantized

LAYOUT_VERSION = "0.18.0"  # the oldest release that reads 3-bit codes laid out like this


@dataclass(frozen=True, order=True)
class Scheme:
    """What a loader must be told to decode a matrix."""

    bits: int
    symmetric: bool
    group_size: int | None  # None: one scale per row

    @classmethod
    def of(cls, form: Quantized, width: int) -> Scheme:
        """The scheme of a form."""
        assert not isinstance(form.block, int)
        return cls(form.bits, form.zero is None, None if form.block[1] == width else form.block[1])

    @property
    def weights(self) -> dict[str, Any]:
        """The entry `weights` of a config group."""
        strategy = {"strategy": "group", "group_size": self.group_size} if self.group_size else {"strategy": "channel"}
        return {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, **strategy, "dynamic": False}

    @classmethod
    def read(cls, weights: dict[str, Any]) -> Scheme:
        """The scheme from a config group's `weights`."""
        group = weights.get("group_size") if weights.get("strategy") == "group" else None
        return cls(int(weights["num_bits"]), bool(weights.get("symmetric", True)), group)


class CompressedTensors(Format):
    """Integer codes packed along each row."""

    name: ClassVar[str] = "compressed-tensors"
    quant_method: ClassVar[str | None] = "compressed-tensors"

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Codes on an even grid, one scale per row or per group of adjacent inputs, no Conv1D."""
        form = layer.weight
        if not isinstance(form, Quantized) or form.levels is not None:
            return "it stores integer codes under scales, not level tables such as NF4; use format bnb or dense"
        if isinstance(form.block, int) or form.block[0] != 1 or not isinstance(form.scale, Dense):
            return "it stores one scale per row or per group of adjacent inputs"
        if slot.transposed:
            return "transformers fills Conv1D layers with random weights when it reads this format; use bnb or dense"
        if slot.expert and form.zero is not None:
            return "transformers cannot read asymmetric codes of fused experts; use symmetric: true"
        return None

    def check_all(self, layers: Iterable[tuple[Slot, Layer]]) -> str | None:
        """Asymmetric codes are read only where all layers share one scheme."""
        schemes = {_scheme(slot, layer) for slot, layer in layers if self.check(slot, layer) is None}
        if len(schemes) > 1 and any(not s.symmetric for s in schemes):
            return "transformers reads asymmetric codes only where every layer has the same bits and groups"
        return None

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Codes, scales and shape; zeros where asymmetric."""
        form = layer.weight
        assert isinstance(form, Quantized)
        assert isinstance(form.scale, Dense)
        tensors = {
            f"{slot.name}.weight_packed": bitpack.pack(_unsigned(form.codes, form.bits), form.bits),
            f"{slot.name}.weight_scale": form.scale.weight,
            f"{slot.name}.weight_shape": torch.tensor(slot.shape, dtype=torch.int64),
        }
        if form.zero is not None:
            packed = bitpack.pack(_unsigned(form.zero, form.bits).T.contiguous(), form.bits)
            tensors[f"{slot.name}.weight_zero_point"] = packed.T.contiguous()
        return tensors

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """Codes and scales, by the scheme that `config` gives this module."""
        scheme = _find_scheme(config or {}, slot.module)
        out, width = slot.shape
        group = scheme.group_size or width
        codes = _signed(bitpack.unpack(get(f"{slot.name}.weight_packed"), scheme.bits, width), scheme.bits)
        zero = None
        if not scheme.symmetric:
            packed = get(f"{slot.name}.weight_zero_point").T.contiguous()
            zero = _signed(bitpack.unpack(packed, scheme.bits, out).T.contiguous(), scheme.bits)
        return Quantized(codes, Dense(get(f"{slot.name}.weight_scale")), zero, None, (1, group), scheme.bits)

    def config(
        self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str], dtype: torch.dtype
    ) -> dict[str, Any] | None:
        """One config group per scheme; the only one targets all linears but those left out."""
        by_scheme: dict[Scheme, list[str]] = {}
        for slot, layer in layers:
            by_scheme.setdefault(_scheme(slot, layer), []).append(slot.module)
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if len(by_scheme) == 1 else modules,
                "weights": scheme.weights,
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
        if any(not scheme.symmetric for scheme in by_scheme):
            config["dequantize"] = True
        return config

    def cannot_read(self, config: dict[str, Any] | None) -> str | None:
        """Only packed integer weights without rounded inputs."""
        for group in (config or {}).get("config_groups", {}).values():
            weights = group.get("weights") or {}
            if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
                return "only integer weights with scales per group or channel are read"
            if group.get("input_activations") or weights.get("actorder") == "group":
                return "neither rounded inputs nor reordered groups are read"
        packed = (config or {}).get("format") in ("pack-quantized", "mixed-precision")
        return None if packed else "only its format pack-quantized is read"

    def dense_names(self, stored: Iterable[str]) -> dict[str, str]:
        """Every `X.weight_packed` is the weight of X."""
        suffix = ".weight_packed"
        return {name.removesuffix(suffix) + ".weight": name for name in stored if name.endswith(suffix)}

    def companions(self, key: str, stored: Iterable[str]) -> list[str]:
        """Packed codes, scales, shape, zeros."""
        have = set(stored)
        names = (f"{key}_{part}" for part in ("packed", "scale", "shape", "zero_point"))
        return [name for name in names if name in have]

    def dense_info(self, key: str, get: Callable[[str], Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape from the tensor that holds it, dtype from the scales."""
        return tuple(int(n) for n in get(f"{key}_shape")), get(f"{key}_scale").dtype


def _scheme(slot: Slot, layer: Layer) -> Scheme:
    assert isinstance(layer.weight, Quantized)
    return Scheme.of(layer.weight, slot.shape[1])


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return codes.sub(-(1 << bits - 1)).view(torch.uint8)  # eight bits wrap round, as they should


def _signed(codes: Tensor, bits: int) -> Tensor:
    return codes.view(torch.int8).add(-(1 << bits - 1))


def _find_scheme(config: dict[str, Any], module: str) -> Scheme:
    """The scheme of a module: its own name first, a pattern next, then the class `Linear`."""
    groups = list(config.get("config_groups", {}).values())
    ranked = []
    for group in groups:
        for target in group["targets"]:
            if target == module:
                ranked.append((0, group))
            elif target.startswith("re:") and re.match(target[3:], module):
                ranked.append((1, group))
            elif target == "Linear":
                ranked.append((2, group))
    if ranked:
        return Scheme.read(min(ranked, key=lambda pair: pair[0])[1]["weights"])
    raise InputError(f"quantization_config in config.json says nothing about {module}, whose weight is packed.")


FORMAT = CompressedTensors()
