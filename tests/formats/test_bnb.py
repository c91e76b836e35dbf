"""8-bit folders of bitsandbytes as transformers writes them, and what does not fit into one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from helpers import decoded_model, logits, recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmshrink import run
from llmshrink.errors import InputError, PlanError
from llmshrink.evaluate.foreign import compute_in_float32, keep_inputs
from llmshrink.formats import load_format
from llmshrink.formats.base import Slot
from llmshrink.forms import Dense, InputScheme, Layer, Quantized, decode
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate

FORMAT = load_format("bnb")
SLOT = Slot("a.b.weight", "a.b", (8, 16), torch.bfloat16)
CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 4.0}


def layer(threshold: float | None = 6.0, bits: int = 8, group: int = 16) -> Layer:
    codes = torch.randint(-8, 8, (8, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scale = torch.rand(8, 16 // group, generator=torch.Generator().manual_seed(1))
    rounded = None if threshold is None else InputScheme("llm-int8", threshold=threshold)
    return Layer(Quantized(codes, Dense(scale), None, None, (1, group), bits), input=rounded)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_folder_that_transformers_wrote(
    models_folder: Callable[..., Path], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0)
    folder = models_folder(family, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map="cpu")
    dense = {
        name: module.weight.data.float() * module.weight.SCB[:, None] / 127
        for name, module in theirs.named_modules()
        if isinstance(module, Linear8bitLt)
    }
    theirs.save_pretrained(tmp_path / "out")
    model = StreamedModel(open_source(str(tmp_path / "out")), torch.device("cpu"))
    matrices = [m for block in model.anatomy.blocks for m in block.matrices]
    assert {m.module for m in matrices} == set(dense) and {m.key for m in matrices} == model.weights.compressed
    for matrix in matrices:
        assert torch.allclose(matrix.seen(model.weights.get(matrix.key)), dense[matrix.module], rtol=1e-6)
        assert model.weights.input(matrix.key) == InputScheme("llm-int8", threshold=5.0)
    # What transformers computes with decoded weights is what we compute with ours.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    compute_in_float32(again)
    keep_inputs(again)
    ours, output = logits(decoded_model(tmp_path / "out", folder)), logits(again)
    assert (ours - output).abs().max() <= 1e-5 * ours.std()


def test_what_is_written_is_what_transformers_would_write(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    folder = models_folder("llama", torch.bfloat16)
    run.execute(recipe(folder, tmp_path / "ours", text_file, {"name": "int8", "threshold": 4.0}), progress=Silent())
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (tensors_of(tmp_path / name) for name in ("ours", "theirs"))
    quantized = {name: tensor for name, tensor in theirs.items() if ".layers." in name}
    assert {name: (t.dtype, t.shape) for name, t in ours.items() if ".layers." in name} == {
        name: (t.dtype, t.shape) for name, t in quantized.items()
    }
    assert all(torch.equal(ours[name], tensor) for name, tensor in quantized.items())
    said = [json.loads((tmp_path / n / "config.json").read_bytes())["quantization_config"] for n in ("ours", "theirs")]
    for key in ("quant_method", "load_in_8bit", "llm_int8_threshold", "llm_int8_has_fp16_weight"):
        assert said[0][key] == said[1][key]


def test_any_scale_comes_back() -> None:
    made = layer()
    back = FORMAT.unpack(SLOT, FORMAT.pack(SLOT, made).__getitem__, CONFIG)
    assert torch.allclose(decode(back), decode(made.weight), rtol=2e-7), "but for the last digit"


def test_settings_and_tensors_that_are_not_read() -> None:
    tensors = FORMAT.pack(SLOT, layer())
    older = {name: tensor for name, tensor in tensors.items() if not name.endswith("weight_format")}
    assert torch.equal(
        decode(FORMAT.unpack(SLOT, older.__getitem__, CONFIG)), decode(FORMAT.unpack(SLOT, tensors.__getitem__, CONFIG))
    )
    tiled = {**tensors, "a.b.weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(InputError, match="weight_format 2"):
        FORMAT.unpack(SLOT, tiled.__getitem__, CONFIG)
    with pytest.raises(InputError, match="uint8"):
        FORMAT.unpack(SLOT, {**tensors, "a.b.weight": tensors["a.b.weight"].view(torch.uint8)}.__getitem__, CONFIG)
    assert "4 and 8" in (FORMAT.cannot_read({"quant_method": "bitsandbytes"}) or "")


def test_what_does_not_fit_together() -> None:
    assert FORMAT.check(SLOT, layer()) is None
    assert "8-bit" in (FORMAT.check(SLOT, layer(None)) or ""), "the reader would round inputs that nobody asked for"
    assert "8-bit" in (FORMAT.check(SLOT, layer(bits=4)) or "")
    assert "8-bit" in (FORMAT.check(SLOT, layer(group=8)) or "")
    assert "threshold" in (FORMAT.check_all([(SLOT, layer(6.0)), (SLOT, layer(4.0))], []) or "")


def test_a_code_that_changed_shows(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    source, out = models_folder("qwen2"), tmp_path / "out"
    run.execute(recipe(source, out, text_file, {"name": "int8"}), progress=Silent())
    expected = logits(decoded_model(out, source))
    for flipped in (False, True):
        if flipped:
            path = out / "model-00001-of-00003.safetensors"
            tensors = load_file(path)
            tensors["model.layers.0.self_attn.q_proj.weight"].view(-1)[0] ^= 0b110000
            save_file(tensors, path, metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(out).eval()
        compute_in_float32(model)
        keep_inputs(model)
        assert ((expected - logits(model)).abs().max() > 1e-4 * expected.std()) == flipped


@pytest.mark.parametrize("to", ["bnb", "compressed-tensors", "dense"])
def test_exports(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, to: str) -> None:
    source = models_folder("llama", torch.float16)
    run.execute(recipe(source, tmp_path / "int8", text_file, {"name": "int8", "threshold": 4.0}), progress=Silent())
    wanted = {
        "version": 1,
        "model": {"id": str(tmp_path / "int8")},
        "stages": [{"task": "export", "format": {"name": to}}],
        "evaluation": {"data": [], "speed": False},
        "output": str(tmp_path / "out"),
    }
    report = run.execute(validate(wanted), progress=Silent())
    kept = to == "bnb"
    assert [event.kind for event in report.events] == ([] if kept else ["exact_inputs", "rounded"])
    before, after = (StreamedModel(open_source(str(tmp_path / n)), torch.device("cpu")) for n in ("int8", "out"))
    for key in before.weights.compressed:
        one, other = before.weights.get(key), after.weights.get(key).float()
        assert torch.equal(one, other) if kept else (one - other).norm() < 2**-10 * one.norm()
    if kept:
        assert all(
            torch.equal(t, tensors_of(tmp_path / "int8")[name]) for name, t in tensors_of(tmp_path / "out").items()
        )
        configs = [(tmp_path / n / "config.json").read_bytes() for n in ("int8", "out")]
        assert configs[0] == configs[1]


def test_only_bitsandbytes_is_told_of_outliers(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    for fmt in ("compressed-tensors", "gptq", "dense"):
        wanted = recipe(
            models_folder("llama"), tmp_path / "out", text_file, {"name": "int8"}, stage={"format": {"name": fmt}}
        )
        with pytest.raises(PlanError, match="inputs are rounded so; bnb can"):
            run.make_plan(wanted)
