"""What is wrong is told by the command line: the exit code, what it is about, and nothing left beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmshrink.checks import preflight

Harm = Callable[[Path], None]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put(name: str, value: float) -> Harm:
    """Spoil one value of a tensor."""

    def harm(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors[name].view(-1)[5] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return harm


def weights_of_another(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    wider = {name: torch.cat([t, t]) if "up_proj" in name else t for name, t in tensors.items()}
    save_file(wider, path, metadata={"format": "pt"})


def index_of_another(folder: Path) -> None:
    names = [*load_file(folder / "model.safetensors"), "model.layers.2.mlp.up_proj.weight"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


SPOILED: dict[str, tuple[Harm, int, str]] = {
    "mismatched": (lambda f: edit_config(f, intermediate_size=48), 8, "mlp"),
    "shard of another model": (weights_of_another, 8, "up_proj"),
    "index of another model": (index_of_another, 8, "'model.layers.2.mlp.up_proj.weight' is in"),
    "incomplete": (drop_a_tensor, 8, "model.layers.1.mlp.up_proj.weight"),
    "unknown type": (lambda f: edit_config(f, model_type="surprise"), 8, "'surprise'"),
    "no config": (lambda f: (f / "config.json").unlink(), 8, "config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), 8, "config.json"),
    "no tokenizer": (drop_tokenizer, 8, "no tokenizer"),
    "quantized elsewhere": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), 3, "awq"),
}


@pytest.mark.parametrize(("harm", "code", "words"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_model(
    refused: Callable[..., tuple[int, str, set[str]]], model: Path, harm: Harm, code: int, words: str
) -> None:
    harm(model)
    found, said, left = refused(model)
    assert (found, left) == (code, set())
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_value_that_is_not_finite(
    models_folder: Callable[..., Path],
    refused: Callable[..., tuple[int, str, set[str]]],
    tmp_path: Path,
    name: str,
    value: float,
) -> None:
    folder = shutil.copytree(models_folder("qwen2"), tmp_path / "model")
    put(name, value)(folder)
    found, said, left = refused(folder)
    assert (found, left) == (8, set())
    assert f"{name!r} has 1 values that are NaN or infinite (the first at index 5)" in said


ARGUMENTS: dict[str, tuple[list[str], int, str]] = {
    "unknown key": (["--set", "calibration.smaples=3"], 3, "smaples"),
    "bits": (["--bits", "5"], 3, "5"),
    "pattern": (["--set", 'ignore=["nothing.*"]'], 3, "nothing.*"),
    "group size": (["--group-size", "48"], 3, "does not divide"),
    "device": (["--device", "tpu"], 2, "tpu"),
    "no such text": (["--calibration", "/nowhere/text.txt"], 8, "/nowhere/text.txt"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments(
    refused: Callable[..., tuple[int, str, set[str]]], smallest: Path, arguments: list[str], code: int, words: str
) -> None:
    found, said, left = refused(smallest, *arguments)
    assert (found, left) == (code, set())
    assert words in said


def test_no_such_model(refused: Callable[..., tuple[int, str, set[str]]], tmp_path: Path) -> None:
    found, said, left = refused(tmp_path / "nothing")
    assert (found, left) == (4, set()) and str(tmp_path / "nothing") in said


@pytest.mark.parametrize("text", ["", "\n\n", "too short"])
def test_too_little_text(
    refused: Callable[..., tuple[int, str, set[str]]], smallest: Path, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text)
    found, said, left = refused(smallest, "--calibration", path)
    assert (found, left) == (8, set()) and str(path) in said and "too short" in said


def test_no_room_on_the_disk(
    refused: Callable[..., tuple[int, str, set[str]]], smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 0, 1000))
    found, said, left = refused(smallest)
    assert (found, left) == (6, set()) and "of disk" in said


def test_no_memory(
    refused: Callable[..., tuple[int, str, set[str]]], smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "memory_there", lambda _: 1 << 20)
    found, said, left = refused(smallest)
    assert (found, left) == (6, set()) and "of memory" in said
