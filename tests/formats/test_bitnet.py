"""BitNet folders against transformers' own packer and linears."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmshrink import run
from llmshrink.errors import InputError, RecipeError
from llmshrink.formats import load_format
from llmshrink.formats.base import Slot
from llmshrink.forms import Dense, InputScheme, Quantized, decode
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate

with warnings.catch_warnings():  # of torch, which uses itself in an old way
    warnings.simplefilter("ignore", DeprecationWarning)
    from transformers.integrations.bitnet import ActQuant, AutoBitLinear, BitLinear, pack_weights, unpack_weights

FORMAT = load_format("bitnet")
SLOT = Slot("a.b.weight", "a.b", (24, 16), torch.bfloat16)
OFFLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
PLAIN = {"quant_method": "bitnet"}


def ternary(rows: int, width: int, seed: int) -> Tensor:
    return torch.randint(-1, 2, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


def folder_of(source: Path, out: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    """A copy of a folder whose linears are packed as BitNet; what they mean, float32, by their keys."""
    shutil.copytree(source, out)
    path = out / "model.safetensors"
    tensors, meaning = load_file(path), {}
    for number, key in enumerate(sorted(k for k in tensors if "_proj." in k)):
        codes, scale = ternary(*tensors[key].shape, number), torch.tensor([0.0625 + number / 256]).bfloat16()
        scale = scale if settings is OFFLINE else 1 / scale.float()
        meaning[key] = codes * scale if settings is OFFLINE else codes / scale
        tensors[key], tensors[f"{key}_scale"] = pack_weights(codes.clone()), scale
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_bytes())
    skip = {"modules_to_not_convert": ["lm_head"]}
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": {**settings, **skip}}))
    return meaning


@pytest.mark.parametrize("settings", [OFFLINE, PLAIN], ids=["autobitlinear", "bitlinear"])
def test_codes_and_scales_are_those_that_transformers_holds(
    models_folder: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    meaning = folder_of(models_folder("llama"), tmp_path / "model", settings)
    model = StreamedModel(open_source(str(tmp_path / "model")), torch.device("cpu"))
    assert model.weights.compressed == set(meaning)
    with torch.compiler.set_stance("force_eager"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        for key, weight in meaning.items():
            module = theirs.get_submodule(key.removesuffix(".weight"))
            if isinstance(module, BitLinear):
                held = unpack_weights(module.weight, torch.float32) / module.weight_scale
            else:
                assert isinstance(module, AutoBitLinear)
                held = module.weight * module.weight_scale
            ours = model.weights.get(key)
            assert torch.allclose(ours, held, rtol=2e-7, atol=0) and torch.allclose(ours, weight, rtol=2e-7, atol=0)
            assert model.weights.input(key) == InputScheme("bitnet")


def test_the_model_gives_out_what_transformers_gives_out(models_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder_of(models_folder("llama"), tmp_path / "model", OFFLINE)
    tokens = torch.randint(0, 160, (1, 32), generator=torch.Generator().manual_seed(0))
    whole = StreamedModel(open_source(str(tmp_path / "model")), torch.device("cpu")).whole()
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)(tokens).logits
        ours = whole.float()(tokens).logits
    # A difference in the last digit may round an input the other way.
    assert (ours - theirs).square().mean().sqrt() < 0.02 * theirs.std()


def test_inputs_are_rounded_as_transformers_does() -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, 0] = 0
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(InputScheme("bitnet").round(x), ActQuant.apply(x))


@pytest.mark.parametrize("to", ["compressed-tensors", "dense"])
def test_an_export_keeps_every_code(models_folder: Callable[..., Path], tmp_path: Path, to: str) -> None:
    meaning = folder_of(models_folder("llama", torch.bfloat16), tmp_path / "model", OFFLINE)
    wanted = {
        "version": 1,
        "model": {"id": str(tmp_path / "model")},
        "stages": [{"task": "export", "format": {"name": to}}],
        "evaluation": {"data": [], "speed": False},
        "output": str(tmp_path / "out"),
    }
    report = run.execute(validate(wanted), progress=Silent())
    assert [event.kind for event in report.events] == ["exact_inputs"]
    assert all(check.passed for check in report.stages[0].checks)
    written = StreamedModel(open_source(str(tmp_path / "out")), torch.device("cpu"))
    assert all(torch.equal(written.weights.get(key).float(), weight) for key, weight in meaning.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    if to == "dense":
        assert all(torch.equal(again.get_parameter(key), weight) for key, weight in meaning.items())


def test_dense_weights_that_are_ternary_are_found(models_folder: Callable[..., Path], tmp_path: Path) -> None:
    meaning = folder_of(models_folder("llama", torch.bfloat16), tmp_path / "packed", OFFLINE)
    shutil.copytree(models_folder("llama", torch.bfloat16), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {k: w.bfloat16() for k, w in meaning.items()}, path, metadata={"format": "pt"})
    wanted = {
        "version": 1,
        "model": {"id": str(tmp_path / "model")},
        "stages": [{"task": "quantize", "method": {"name": "ternary", "group_size": 32}}],
        "evaluation": {"data": [], "speed": False},
        "output": str(tmp_path / "out"),
    }
    report = run.execute(validate(wanted), progress=Silent())
    assert all(layer.relative_error == 0 for layer in report.stages[0].layers)
    assert [event.kind for event in report.events] == ["caution"]
    written = StreamedModel(open_source(str(tmp_path / "out")), torch.device("cpu"))
    assert all(torch.equal(written.weights.get(key), weight) for key, weight in meaning.items())


def test_what_is_not_read_or_written() -> None:
    assert "quantization_mode" in (FORMAT.cannot_read({**OFFLINE, "quantization_mode": "online"}) or "")
    assert "use_rms_norm" in (FORMAT.cannot_read({**PLAIN, "use_rms_norm": True}) or "")
    packed = pack_weights(ternary(24, 16, 0))
    tensors = {"a.b.weight": packed, "a.b.weight_scale": torch.tensor([0.5])}
    form = FORMAT.unpack(SLOT, tensors.__getitem__, OFFLINE)
    assert isinstance(form, Quantized) and isinstance(form.scale, Dense) and form.scale.weight.shape == (24, 1)
    assert torch.equal(decode(form), ternary(24, 16, 0) / 2)
    with pytest.raises(InputError, match="none of -1, 0 and 1"):
        FORMAT.unpack(SLOT, {**tensors, "a.b.weight": packed | 3}.__getitem__, OFFLINE)
    with pytest.raises(InputError, match="one scale"):
        FORMAT.unpack(SLOT, {**tensors, "a.b.weight_scale": torch.ones(24)}.__getitem__, OFFLINE)
    with pytest.raises(KeyError):
        load_format("nothing")


def test_it_is_no_format_of_a_recipe() -> None:
    with pytest.raises(RecipeError, match="there is no format 'bitnet'"):
        validate({"version": 1, "stages": [{"task": "export", "format": {"name": "bitnet"}}]})
