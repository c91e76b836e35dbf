"""8-bit codes with rounded inputs, as compressed-tensors itself stores them and reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import Tensor

from llmshrink.formats import load_format
from llmshrink.formats.base import Slot
from llmshrink.forms import CodeKind, InputScheme, Layer, decode
from llmshrink.methods import load_method
from llmshrink.methods.base import Prepared

FORMAT = load_format("compressed-tensors")
SHAPE = (24, 64)
SCALE = torch.tensor([0.03125])
INT: tuple[str, dict[str, Any]] = ("rtn", {"bits": 8, "group_size": -1})
CASES: dict[str, tuple[tuple[str, dict[str, Any]], InputScheme | None]] = {
    "int-quantized": (INT, InputScheme("int")),
    "int-quantized static": (INT, InputScheme("int", SCALE)),
    "float-quantized": (("fp8", {}), InputScheme("float")),
    "float-quantized static": (("fp8", {"scale_per": "tensor"}), InputScheme("float", SCALE)),
    "naive-quantized": (("fp8", {}), None),
    "pack-quantized": (INT, None),
}


def slot(name: str = "a.b", dtype: torch.dtype = torch.float32) -> Slot:
    return Slot(f"{name}.weight", name, SHAPE, dtype)


def layer(case: str, dtype: torch.dtype = torch.float32) -> Layer:
    (name, settings), inputs = CASES[case]
    method = load_method(name)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(dtype)
    return replace(method(method.Config(**settings)).compress(weight, Prepared()), input=inputs)


def stored(case: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    made = layer(case, dtype)
    config = FORMAT.config([(slot(dtype=dtype), made)], ["lm_head"], dtype)
    assert config is not None and FORMAT.cannot_read(config) is None
    return FORMAT.pack(slot(dtype=dtype), made), config


def scheme_of(config: dict[str, Any]) -> QuantizationScheme:
    """The only config group as compressed-tensors parses it, with what it left out filled in."""
    parsed = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "version"})
    [scheme] = parsed.config_groups.values()
    return scheme


@pytest.mark.parametrize("case", CASES)
def test_it_calls_the_layout_what_compressed_tensors_does(case: str) -> None:
    _, config = stored(case)
    scheme = scheme_of(config)
    assert config["format"] == case.split()[0] == scheme.format
    assert infer_module_format(torch.nn.Linear, scheme.model_copy(update={"format": None})).value == config["format"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_decodes_what_is_written(case: str, dtype: torch.dtype) -> None:
    tensors, config = stored(case, dtype)
    local = {name.removeprefix("a.b."): tensor for name, tensor in tensors.items()}
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    dense = compressor.decompress(local, scheme_of(config))["weight"]
    assert dense.dtype == dtype
    assert torch.equal(decode(layer(case, dtype).weight).to(dtype), dense)


@pytest.mark.parametrize("case", [case for case in CASES if case != "pack-quantized"])
def test_it_writes_the_tensors_that_compressed_tensors_writes(case: str) -> None:
    tensors, config = stored(case)
    dense = decode(layer(case).weight)
    state = {"weight": dense, **{n.removeprefix("a.b."): t for n, t in tensors.items() if n.endswith("_scale")}}
    theirs = BaseCompressor.get_value_from_registry(config["format"]).compress(state, scheme_of(config))
    assert {f"a.b.{name}" for name in theirs} == set(tensors)
    for name, tensor in theirs.items():
        ours = tensors[f"a.b.{name}"]
        assert ours.shape == tensor.shape and ours.dtype == tensor.dtype
        assert torch.equal(ours.view(torch.uint8), tensor.view(torch.uint8)) or torch.equal(
            ours.float(), tensor.float()
        )


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str) -> None:
    tensors, config = stored(case)
    key = "a.b.weight"
    assert set(FORMAT.dense_names(tensors)) == {key}
    assert sorted(FORMAT.companions(key, tensors)) == sorted(tensors)
    assert FORMAT.dense_info(key, tensors.__getitem__, config) == (SHAPE, torch.float32)
    made, back = layer(case), FORMAT.unpack(slot(), tensors.__getitem__, config)
    assert torch.equal(decode(back), decode(made.weight))
    rounded = FORMAT.unpack_input(slot(), tensors.__getitem__, config)
    assert Layer(back, input=rounded).scheme == made.scheme
    x = torch.randn(3, 64)
    if made.input is not None:
        assert rounded is not None and torch.equal(rounded.round(x), made.input.round(x))
    name = FORMAT.dense_names(tensors)[key]
    tensors[name] = tensors[name].clone()
    tensors[name].view(torch.uint8).view(-1)[0] ^= 8
    assert not torch.equal(decode(FORMAT.unpack(slot(), tensors.__getitem__, config)), decode(made.weight))


def test_layers_may_be_stored_in_different_ways() -> None:
    given = [(slot(f"m.{i}"), layer(case)) for i, case in enumerate(CASES)]
    config = FORMAT.config(given, [], torch.float32)
    assert config is not None and config["format"] == "mixed-precision" and FORMAT.cannot_read(config) is None
    tensors = {name: tensor for place, made in given for name, tensor in FORMAT.pack(place, made).items()}
    assert set(FORMAT.dense_names(tensors)) == {place.key for place, _ in given}
    for place, made in given:
        assert torch.equal(decode(FORMAT.unpack(place, tensors.__getitem__, config)), decode(made.weight))
        rounded = FORMAT.unpack_input(place, tensors.__getitem__, config)
        assert Layer(made.weight, input=rounded).scheme == made.scheme


@pytest.mark.parametrize(
    ("method", "settings", "kind"),
    [
        ("rtn", {"bits": 4, "group_size": 32}, "int"),
        ("rtn", {"bits": 8, "group_size": 32}, "int"),
        ("rtn", {"bits": 8, "group_size": -1, "symmetric": False}, "int"),
        ("rtn", {"bits": 8, "group_size": -1}, "float"),
        ("fp8", {}, "int"),
    ],
)
def test_other_codes_meet_no_rounded_inputs(method: str, settings: dict[str, Any], kind: CodeKind) -> None:
    cls = load_method(method)
    made = cls(cls.Config(**settings)).form(SHAPE, torch.float32)
    assert FORMAT.check(slot(), made) is None
    why = FORMAT.check(slot(), replace(made, input=InputScheme(kind)))
    assert why is not None and "inputs fp8 with method fp8" in why


def test_formats_for_integers_refuse_floats() -> None:
    assert "integer codes" in (load_format("gptq").check(slot(), layer("naive-quantized")) or "")
    assert "4-bit" in (load_format("awq").check(slot(), layer("naive-quantized")) or "")
    assert "table of levels" in (load_format("bnb").check(slot(), layer("naive-quantized")) or "")


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_activations": {**TOKEN, "num_bits": 4}}, "inputs rounded to 8 bits"),
        ({"input_activations": {**TOKEN, "symmetric": False}}, "symmetric"),
        ({"input_activations": {**TOKEN, "strategy": "tensor"}}, "per token or with one static scale"),
        ({"output_activations": TOKEN}, "rounded outputs"),
        ({"weights": {**CHANNEL, "strategy": "block"}}, "per group or channel"),
        ({"weights": {**CHANNEL, "type": "float", "num_bits": 4}}, "8-bit floats"),
        ({"format": "nvfp4-pack-quantized"}, "only its formats"),
    ],
)
def test_what_is_not_done_is_not_read(change: dict[str, Any], words: str) -> None:
    group = {"targets": ["Linear"], "weights": CHANNEL, "input_activations": TOKEN, "format": "int-quantized"}
    assert FORMAT.cannot_read({"format": "int-quantized", "config_groups": {"group_0": group}}) is None
    assert words in (FORMAT.cannot_read({"config_groups": {"group_0": {**group, **change}}}) or "")
