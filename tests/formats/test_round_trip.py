"""unpack(pack(form)) is the form, bit for bit; sizes on `meta` are the sizes of the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmshrink.formats import format_names, format_of, load_format
from llmshrink.formats.base import Kind, Slot
from llmshrink.forms import Layer, Quantized, decode
from llmshrink.methods import load_method

SHAPE = (32, 64)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    (name, "rtn", {"bits": bits, "group_size": group, "symmetric": symmetric})
    for name in ("compressed-tensors", "gptq", "awq")
    for bits in (2, 3, 4, 8)
    for group in (-1, 32, 64)
    for symmetric in (True, False)
    if bits == 4 or name != "awq"
] + [("bnb", kind, {"block_size": 64, "double_quant": double}) for kind in ("nf4", "fp4") for double in (False, True)]
CASES += [("bnb", "int8", {"threshold": 4.0}), ("bnb", "int8", {})]
CASES += [
    (name, method, {"group_size": group})
    for name in ("compressed-tensors", "gptq")
    for method in ("hqq", "ternary", "binary")
    for group in (-1, 32)
]


def slot(kind: Kind = "linear", dtype: torch.dtype = torch.bfloat16) -> Slot:
    return Slot("a.b.weight", "a.b", SHAPE, dtype, kind)


def compress(
    method: str, settings: dict[str, Any], dtype: torch.dtype, scales: torch.dtype | None = None
) -> tuple[Layer, Layer]:
    made = load_method(method)
    instance = made(made.Config(**settings), scales)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(dtype)
    prepared = instance.prepare(instance.needs(SHAPE[1], torch.device("cpu")))
    return instance.compress(weight, prepared), instance.form(SHAPE, dtype)


@pytest.mark.parametrize(("name", "method", "settings"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip(name: str, method: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    fmt, place = load_format(name), slot(dtype=dtype)
    layer, empty = compress(method, settings, dtype, fmt.scale_dtype(dtype))
    packed, planned = fmt.pack(place, layer), fmt.pack(place, empty)
    config = fmt.config([(place, empty)], [], dtype)
    assert fmt.check(place, empty) is None
    back = fmt.unpack(place, packed.__getitem__, config)
    assert isinstance(back, Quantized)
    assert torch.equal(decode(back), decode(layer.weight))
    assert {n: (t.shape, t.dtype) for n, t in packed.items()} == {n: (t.shape, t.dtype) for n, t in planned.items()}
    assert fmt.dense_names(packed) == {"a.b.weight": fmt.dense_names(packed)["a.b.weight"]}
    assert sorted(fmt.companions("a.b.weight", packed)) == sorted(packed)
    own = {"nf4": dtype, "fp4": dtype, "int8": torch.float16}.get(method, fmt.scale_dtype(dtype))
    assert fmt.dense_info("a.b.weight", packed.__getitem__, config) == (SHAPE, own)


@pytest.mark.parametrize(("name", "method", "settings"), CASES[::3])
def test_one_flipped_code_is_seen(name: str, method: str, settings: dict[str, Any]) -> None:
    fmt = load_format(name)
    layer, empty = compress(method, settings, torch.bfloat16, fmt.scale_dtype(torch.bfloat16))
    packed = fmt.pack(slot(), layer)
    key = fmt.dense_names(packed)["a.b.weight"] if name != "bnb" else "a.b.weight"
    packed[key] = packed[key].clone()
    packed[key].view(-1)[0] ^= 1
    back = fmt.unpack(slot(), packed.__getitem__, fmt.config([(slot(), empty)], [], torch.bfloat16))
    assert not torch.equal(decode(back), decode(layer.weight))


def test_dense_keeps_the_order_of_the_disk() -> None:
    layer, _ = compress("rtn", {"bits": 4, "group_size": 32}, torch.float32)
    fmt = load_format("dense")
    packed = fmt.pack(slot("conv1d", dtype=torch.float32), layer)
    assert packed["a.b.weight"].shape == SHAPE[::-1]
    back = fmt.unpack(slot("conv1d", dtype=torch.float32), packed.__getitem__, None)
    assert torch.equal(decode(back), decode(layer.weight))


def test_formats_refuse_what_they_cannot_hold() -> None:
    integers, _ = compress("rtn", {"bits": 4, "group_size": 32, "symmetric": False}, torch.bfloat16)
    levels, _ = compress("nf4", {}, torch.bfloat16)
    packed, bnb = load_format("compressed-tensors"), load_format("bnb")
    assert "level tables" in (packed.check(slot(), levels) or "")
    assert "table of levels" in (bnb.check(slot(), integers) or "")


def test_a_config_leads_back_to_its_format() -> None:
    for name in format_names():
        fmt = load_format(name)
        said = {"quant_method": fmt.quant_method, "format": fmt.name}
        assert format_of(None if fmt.quant_method is None else said) is fmt
    assert format_of({"quant_method": "mystery"}) is None
