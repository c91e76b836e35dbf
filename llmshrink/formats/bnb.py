"""bitsandbytes, as transformers serializes it (`load_in_4bit`, `load_in_8bit`).

With 4 bits a matrix `X.weight` [out, in] becomes
    X.weight                uint8 [out * in / 2, 1], two codes a byte, the first in the high nibble, rows flattened
    X.weight.absmax         float32 [blocks], or uint8 where the scales are quantized themselves
    X.weight.quant_map      float32 [16]
    X.weight.nested_absmax, X.weight.nested_quant_map     float32 [blocks / 256], [256] (double quantization)
    X.weight.quant_state.bitsandbytes__nf4    uint8, a JSON object with dtype, shape, block sizes and offset
and with 8 bits (LLM.int8)
    X.weight                int8 [out, in]
    X.SCB                   float32 [out], the largest magnitude of each row: W = code * SCB / 127
    X.weight_format         uint8 scalar, 0: codes lie row by row
Transformers replaces linears and Conv1Ds (a Conv1D is stored as [out, in]). The JSON is padded with spaces to a length
that does not depend on the offset's digits: the plan knows the file's size exactly.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmshrink.errors import InputError
from llmshrink.formats.base import Format, Kind, Slot
from llmshrink.forms import Dense, Form, InputKind, InputScheme, Layer, Quantized, Scheme

FLOAT_DIGITS = 32  # room for any float64 in JSON
STATE = "quant_state.bitsandbytes__"
ROWS = Scheme(8, True, None)  # of LLM.int8
LARGEST = 127  # its code for the largest magnitude of a row
THRESHOLD = 6.0  # what loaders take where nothing is said


class BitsAndBytes(Format):
    """Blocks of the flattened matrix and a table of 16 levels, or rows of 8-bit codes."""

    name: ClassVar[str] = "bnb"
    quant_method: ClassVar[str | None] = "bitsandbytes"
    marks: ClassVar[tuple[str, ...]] = (f".weight.{STATE}nf4", f".weight.{STATE}fp4", ".SCB")
    parts: ClassVar[tuple[str, ...]] = (
        *(".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map"),
        *(*marks, ".weight_format"),
    )
    rounded_inputs: ClassVar[tuple[InputKind, ...]] = ("llm-int8",)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Scales are stored in float32, whatever the model's dtype."""
        return torch.float32

    def check(self, slot: Slot, layer: Layer) -> str | None:
        """4-bit codes into a level table, blocks over the flattened matrix; or 8-bit codes and a scale for each row."""
        form = layer.weight
        if _by_row(layer):
            return None
        if not isinstance(form, Quantized) or form.levels is None or form.bits != 4 or not isinstance(form.block, int):
            return (
                "it stores 4-bit codes into a table of levels (methods nf4 and fp4), or 8-bit codes with one scale "
                "per output (int8); use compressed-tensors or dense"
            )
        if slot.shape[0] * slot.shape[1] % 2:
            return "an odd number of weights does not fill whole bytes"
        return None

    def rounds_inputs(self, kind: Kind, config: dict[str, Any] | None) -> bool:
        """Those of 8-bit codes."""
        return True

    def check_all(self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str]) -> str | None:
        """One `quantization_config` describes all layers."""
        kinds = {_threshold(layer) if _by_row(layer) else _four_bits(layer) for _, layer in layers}
        return "it has one kind, block size, scale table and threshold for all layers" if len(kinds) > 1 else None

    def unpack_input(
        self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> InputScheme | None:
        """LLM.int8 rounds inputs, 4 bits do not."""
        if config is None or not config.get("load_in_8bit"):
            return None
        return InputScheme("llm-int8", threshold=float(config.get("llm_int8_threshold", THRESHOLD)))

    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """Codes, tables and the JSON that bitsandbytes reads back."""
        form = layer.weight
        assert isinstance(form, Quantized)
        if form.levels is None:
            return _pack_rows(slot, form)
        codes = form.codes.reshape(-1, 2)
        state: dict[str, Any] = {
            "quant_type": _quant_type(form),
            "blocksize": form.block,
            "dtype": str(slot.dtype).removeprefix("torch."),
            "shape": list(slot.shape),
        }
        tensors = {"": ((codes[:, 0] << 4) | codes[:, 1]).unsqueeze(1), ".quant_map": form.levels}
        if isinstance(form.scale, Quantized):
            nested = form.scale
            assert isinstance(nested.scale, Dense)
            assert nested.levels is not None
            tensors |= {
                ".absmax": nested.codes,
                ".nested_absmax": nested.scale.weight,
                ".nested_quant_map": nested.levels,
            }
            offset = 0.0 if nested.offset is None or nested.offset.is_meta else float(nested.offset)
            state |= {"nested_blocksize": nested.block, "nested_dtype": "float32", "nested_offset": offset}
        else:
            assert isinstance(form.scale, Dense)
            tensors[".absmax"] = form.scale.weight
        tensors[f".{STATE}{_quant_type(form)}"] = _json_tensor(state)
        return {slot.key + suffix: tensor for suffix, tensor in tensors.items()}

    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """Codes and tables as bitsandbytes would see them."""
        if config is not None and config.get("load_in_8bit"):
            return _unpack_rows(slot, get)
        state = _read_state(slot.key, get, config)
        data = get(slot.key).flatten()
        codes = torch.stack((data >> 4, data & 15), dim=1).view(slot.shape)
        absmax = get(f"{slot.key}.absmax")
        scale: Form = Dense(absmax)
        if "nested_blocksize" in state:
            scale = Quantized(
                absmax,
                Dense(get(f"{slot.key}.nested_absmax")),
                None,
                get(f"{slot.key}.nested_quant_map"),
                int(state["nested_blocksize"]),
                8,
                torch.tensor(state["nested_offset"], dtype=torch.float32),
            )
        return Quantized(codes, scale, None, get(f"{slot.key}.quant_map"), int(state["blocksize"]), 4)

    def config(
        self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str], dtype: torch.dtype
    ) -> dict[str, Any] | None:
        """What BitsAndBytesConfig needs to load without being told anything."""
        layer = next(iter(layers))[1]
        form = layer.weight
        assert isinstance(form, Quantized)
        if _by_row(layer):
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": False,
                "load_in_8bit": True,
                "llm_int8_threshold": _threshold(layer),
                "llm_int8_has_fp16_weight": False,
                "llm_int8_skip_modules": sorted(left),
            }
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": _quant_type(form),
            "bnb_4bit_use_double_quant": isinstance(form.scale, Quantized),
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(left),
        }

    def cannot_read(self, config: dict[str, Any] | None) -> str | None:
        """All that its readers serialize, but for 4-bit codes stored as other numbers than bytes."""
        if config is not None and config.get("load_in_8bit"):
            return None
        if config is None or not config.get("load_in_4bit"):
            return "only its kinds of 4 and 8 bits are read"
        storage = config.get("bnb_4bit_quant_storage", "uint8")
        return None if storage == "uint8" else f"codes stored as {storage} are not read"

    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype from the state; of 8 bits those of the codes and of what bitsandbytes computes in."""
        if config is not None and config.get("load_in_8bit"):
            return tuple(get(key).shape), torch.float16
        state = _read_state(key, get, None)
        shape, dtype = tuple(operator.index(n) for n in state["shape"]), getattr(torch, state["dtype"])
        if not isinstance(dtype, torch.dtype) or len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"no matrix is {list(shape)} of {state['dtype']!r}")
        return shape, dtype


def _by_row(layer: Layer) -> bool:
    """Whether it is one of LLM.int8: 8-bit codes, a scale for each row, inputs rounded as the reader rounds them."""
    rounded = layer.input is not None and layer.input.kind == "llm-int8"
    return rounded and isinstance(layer.weight, Quantized) and layer.weight.scheme == ROWS


def _four_bits(layer: Layer) -> tuple[Any, ...]:
    """What may not differ between layers of 4 bits."""
    form = layer.weight
    assert isinstance(form, Quantized)
    return _quant_type(form), form.block, isinstance(form.scale, Quantized)


def _threshold(layer: Layer) -> float:
    assert layer.input is not None
    return layer.input.threshold


def _pack_rows(slot: Slot, form: Quantized) -> dict[str, Tensor]:
    """The tensors of 8-bit codes. That a row's largest magnitude is a float16 brings it back from its share exactly."""
    assert isinstance(form.scale, Dense)
    largest = form.scale.weight[:, 0].float() * LARGEST
    half = largest.half().float()
    return {
        slot.key: form.codes,
        f"{slot.name}.SCB": torch.where(half.mul(1 / LARGEST) == form.scale.weight[:, 0], half, largest),
        f"{slot.name}.weight_format": torch.zeros((), dtype=torch.uint8, device=largest.device),
    }


def _unpack_rows(slot: Slot, get: Callable[[str], Tensor]) -> Quantized:
    codes, largest = get(slot.key), get(f"{slot.name}.SCB")
    if codes.dtype != torch.int8:
        raise InputError(f"{slot.key}: its codes are {codes.dtype}, and its settings say 8 bits.")
    try:
        layout = int(get(f"{slot.name}.weight_format"))
    except KeyError:
        layout = 0
    if layout:
        raise InputError(f"{slot.key}: its codes are laid out for a kernel (weight_format {layout}); only 0 is read.")
    scale = Dense(largest.float().mul(1 / LARGEST).view(-1, 1))
    return Quantized(codes, scale, None, None, (1, codes.shape[1]), 8)


def _quant_type(form: Quantized) -> str:
    """nf4 or fp4: the FP4 table is not sorted, its second half being the negative of the first."""
    assert form.levels is not None
    return "nf4" if bool((form.levels.diff() > 0).all()) else "fp4"


def _json_tensor(state: dict[str, Any]) -> Tensor:
    raw = json.dumps(state)
    length = len(raw)
    if "nested_offset" in state:
        length += FLOAT_DIGITS - len(json.dumps(state["nested_offset"]))
    return torch.tensor(list(raw.ljust(length).encode()), dtype=torch.uint8)


def _read_state(key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> dict[str, Any]:
    kinds = [config["bnb_4bit_quant_type"]] if config else ["nf4", "fp4"]
    for kind in kinds:
        try:
            raw = get(f"{key}.{STATE}{kind}")
        except KeyError:
            continue
        try:
            state: dict[str, Any] = json.loads(bytes(raw.tolist()))
        except ValueError as error:
            raise InputError(f"{key}: its quantization state is not valid JSON: {error}") from error
        return state
    raise InputError(f"{key}: no quantization state beside it; the file is incomplete.")


FORMAT = BitsAndBytes()
