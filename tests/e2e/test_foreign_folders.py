"""Folders whose settings and tensors do not fit each other, or mean what older tools meant: read right, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmshrink import run
from llmshrink.errors import InputError, LlmshrinkError, PlanError
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate

RTN = {"name": "rtn", "bits": 4, "group_size": 32}
METHODS = {
    "gptq": RTN,
    "awq": {**RTN, "symmetric": False},
    "compressed-tensors": {**RTN, "symmetric": False},
    "bnb": {"name": "nf4", "block_size": 32},
}
LAYER = "model.layers.0.mlp.up_proj"
Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def stored(
    models_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A folder in each format."""
    root, found = tmp_path_factory.mktemp("stored"), {}
    for fmt, method in METHODS.items():
        found[fmt] = root / fmt
        wanted = recipe(
            models_folder("llama", torch.float16), found[fmt], text_file, method, stage={"format": {"name": fmt}}
        )
        run.execute(wanted, progress=Silent())
    return found


@pytest.fixture
def edited(stored: dict[str, Path], tmp_path: Path) -> Callable[[str, Edit], Path]:
    """A function format, edit -> a copy whose settings and first block an edit has changed."""

    def make(fmt: str, edit: Edit) -> Path:
        folder = shutil.copytree(stored[fmt], tmp_path / fmt, ignore=shutil.ignore_patterns("quantize_config.json"))
        config, path = json.loads((folder / "config.json").read_bytes()), folder / "model-00001-of-00003.safetensors"
        tensors = load_file(path)
        edit(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, path, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        data = json.loads(index.read_bytes())
        others = {name: file for name, file in data["weight_map"].items() if file != path.name}
        index.write_text(json.dumps({**data, "weight_map": {**others, **dict.fromkeys(tensors, path.name)}}))
        return folder

    return make


def weight(folder: Path) -> Tensor:
    return StreamedModel(open_source(str(folder)), torch.device("cpu")).weights.get(f"{LAYER}.weight")


def unpacked_zeros(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """As compressed-tensors wrote them before they were packed: int8 [out, groups]."""
    for name in [n for n in tensors if n.endswith("weight_zero_point")]:
        packed = tensors[name]
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        tensors[name] = ((packed[:, None] >> shifts[:, None] & 15).flatten(0, 1) - 8).to(torch.int8)


def never_ordered(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["actorder"] = "group"
    for name in [n.removesuffix("_packed") for n in tensors if n.endswith("weight_packed")]:
        tensors[f"{name}_g_idx"] = torch.full((int(tensors[f"{name}_shape"][1]),), -1, dtype=torch.int32)


def no_order(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.endswith("g_idx")]:
        tensors[name] = torch.zeros_like(tensors[name])


def setting(key: str, value: Any) -> Edit:
    return lambda config, tensors: config["quantization_config"].update({key: value})


@pytest.mark.parametrize(
    ("fmt", "edit"),
    [
        ("compressed-tensors", unpacked_zeros),
        ("compressed-tensors", never_ordered),
        ("gptq", no_order),
        ("gptq", setting("group_size", 64)),  # the group of each input counts
    ],
)
def test_what_older_tools_meant(
    stored: dict[str, Path], edited: Callable[[str, Edit], Path], fmt: str, edit: Edit
) -> None:
    expected = weight(stored[fmt])
    assert torch.equal(weight(edited(fmt, edit)), expected)


def without(key: str) -> Edit:
    return lambda config, tensors: config["quantization_config"].pop(key)


def no_tensor(part: str) -> Edit:
    return lambda config, tensors: tensors.pop(f"{LAYER}.{part}")


def tensor(part: str, value: Tensor) -> Edit:
    return lambda config, tensors: tensors.update({f"{LAYER}.{part}": value})


def scheme(**changes: Any) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return edit


def whole(value: Any) -> Edit:
    return lambda config, tensors: config.update({"quantization_config": value})


def scaled_activations(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.act.scales"] = torch.ones(128)


WRONG: dict[str, tuple[str, Edit, str]] = {
    "settings are a list": ("gptq", whole([1]), "must be an object"),
    "settings are a word": ("awq", whole("awq"), "must be an object"),
    "no group size": ("gptq", without("group_size"), "group_size' is missing"),
    "other bits": ("gptq", setting("bits", 8), "cannot be read|do not belong together|do not cover"),
    "a group too many": ("gptq", tensor("g_idx", torch.full((64,), 9, dtype=torch.int32)), "groups from 9 to 9 of 2"),
    "no scales": ("gptq", no_tensor("scales"), "scales' is missing"),
    "the other version": ("gptq", setting("checkpoint_format", "gptq_v2"), "wrong version"),
    "settings for single layers": ("gptq", setting("dynamic", {"-:.*down": {}}), "dynamic"),
    "wider words": ("gptq", setting("pack_dtype", "int64"), "pack_dtype"),
    "a bias that counts": ("gptq", tensor("bias", torch.ones(128, dtype=torch.float16)), "no place for it"),
    "awq of 8 bits": ("awq", setting("bits", 8), "4 bits"),
    "awq without zero points": ("awq", setting("zero_point", False), "zero points"),
    "scales of activations": (
        "awq",
        lambda c, t: t.update({"model.layers.0.mlp.act.scales": torch.ones(128)}),
        "no place",
    ),
    "a rotation at run time": (
        "compressed-tensors",
        setting("transform_config", {"config_groups": {}}),
        "transform_config",
    ),
    "groups that are a list": ("compressed-tensors", setting("config_groups", [1]), "cannot be read"),
    "symmetric with zero points": ("compressed-tensors", scheme(symmetric=True), "says? .*symmetric|settings say"),
    "groups of another size": ("compressed-tensors", scheme(group_size=16), "do not cover"),
    "no order": ("compressed-tensors", scheme(actorder="group"), "g_idx' is missing"),
    "no shape": ("compressed-tensors", no_tensor("weight_shape"), "weight_shape' is missing"),
    "codes in bfloat16": ("bnb", setting("bnb_4bit_quant_storage", "bfloat16"), "stored as bfloat16"),
    "no kind": ("bnb", without("bnb_4bit_quant_type"), "bnb_4bit_quant_type' is missing"),
}


@pytest.mark.parametrize(("fmt", "edit", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(edited: Callable[[str, Edit], Path], fmt: str, edit: Edit, words: str) -> None:
    folder = edited(fmt, edit)
    with pytest.raises(LlmshrinkError, match=words) as caught:
        weight(folder)
    assert isinstance(caught.value, InputError | PlanError)


def test_scales_that_the_new_format_does_not_hold_are_refused(
    edited: Callable[[str, Edit], Path], tmp_path: Path
) -> None:
    def wide(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["dtype"] = "bfloat16"
        scale = tensors[f"{LAYER}.weight_scale"].bfloat16()
        scale[0, 0] = 1e5
        tensors[f"{LAYER}.weight_scale"] = scale

    data = {
        "version": 1,
        "model": {"id": str(edited("compressed-tensors", wide))},
        "stages": [{"task": "export", "format": {"name": "gptq"}}],
        "evaluation": {"data": [], "speed": False},
        "output": str(tmp_path / "out"),
    }
    with pytest.raises(PlanError, match="up_proj: its scales lie outside of what torch.float16 holds"):
        run.execute(validate(data), progress=Silent())
