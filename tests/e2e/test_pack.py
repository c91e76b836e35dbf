"""Packed codes from end to end: fewer bytes on disk, the same model, the same memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, assert_loads_packed, content, load, recipe
from safetensors.torch import load_file
from torch import nn

from llmshrink import run
from llmshrink.cli import main
from llmshrink.errors import GateError, InputError, InterruptedRun, PlanError, RecipeError
from llmshrink.io.safetensors import write
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe
from llmshrink.report.rows import stage_lines
from llmshrink.report.schema import Check, Report

pytestmark = pytest.mark.usefixtures("without_reader")
CLUSTERED = {"name": "kmeans", "bits": 4, "dim": 1, "weighting": "none"}
FACTORED = {"name": "svd", "rank": 20, "factor_bits": 8}


def wanted(model: Path, out: Path, text: Path, method: dict[str, Any], *, pack: bool = True, **stage: Any) -> Recipe:
    targets = {"targets": ["linears", "embedding", "head"]}
    return recipe(model, out, text, method, stage={"format": {"pack": True} if pack else None, **targets, **stage})


def made(model: Path, out: Path, text: Path, method: dict[str, Any], *, pack: bool = True, **stage: Any) -> Report:
    return run.execute(wanted(model, out, text, method, pack=pack, **stage), progress=Silent())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def held(model: nn.Module) -> int:
    return sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())


@pytest.mark.parametrize(("family", "method"), [("llama", CLUSTERED), ("llama", FACTORED), ("llama-tied", CLUSTERED)])
def test_fewer_bytes_and_the_same_model(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str, method: dict[str, Any]
) -> None:
    original, out, plain = models_folder(family), tmp_path / "out", tmp_path / "plain"
    stage, before = (made(original, folder, text_file, method, pack=folder is out).stages[0] for folder in (out, plain))
    found, usual, said = tensors(out), tensors(plain), settings(out)
    names = said["packed"]["bytes"]
    assert names and {name: len(found[name]) for name in names} == names
    assert all(len(found[name]) < len(usual[name]) for name in names)
    assert all(torch.equal(tensor, usual[name]) for name, tensor in found.items() if name not in names)
    gained = sum(usual[name].nbytes - size for name, size in names.items())
    assert stage.packed is not None and stage.packed.bytes_before - stage.packed.bytes_after == gained > 0
    assert stage.packed.tensors == len(names) and before.packed is None
    assert stage.bytes_after == sum(t.nbytes for t in found.values()) == before.bytes_after - gained
    assert stage.planned_bytes_after == before.bytes_after
    assert sum(a.bytes_after - b.bytes_after for a, b in zip(before.layers, stage.layers, strict=True)) == gained
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == stage.bytes_after and index["weight_map"].keys() == found.keys()
    assert held(load(out)[0]) == held(load(plain)[0])  # nothing of it stays packed
    again = tmp_path / "again"
    assert_loads_packed(stage, out, original, again, 4e-5)
    assert settings(again)["format_version"] == 1 and not settings(again)["packed"]  # it is saved plain
    assert tensors(again).keys() == usual.keys()
    assert all(torch.equal(tensor, usual[name]) for name, tensor in tensors(again).items())


@pytest.fixture(scope="module")
def packed(smallest: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    made(smallest, out, text_file, CLUSTERED)
    return out


@pytest.mark.parametrize("step", ["compress", "pack"])
def test_a_stopped_run_gives_the_same_bytes(
    smallest: Path, packed: Path, text_file: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = wanted(smallest, tmp_path / "out", text_file, CLUSTERED)
    with monkeypatch.context() as patch, pytest.raises((InterruptedRun, KeyboardInterrupt)):
        if step == "pack":  # the first file is written, the second is not
            seen: list[Path] = []
            patch.setattr("llmshrink.output.write", lambda path, found: stopped(path, found, seen))
        run.execute(data, progress=Stopping(note="block") if step == "compress" else Silent())
    report = run.execute(data, progress=Silent())
    assert report.stages[0].resumed_blocks > 0 and report.stages[0].packed is not None
    assert content(tmp_path / "out") == content(packed)


def stopped(path: Path, found: dict[str, torch.Tensor], seen: list[Path]) -> str:
    if seen:
        raise KeyboardInterrupt
    seen.append(path)
    return write(path, found)


def left_out(*_: Any) -> Check:
    return Check(name="reader", passed=True, detail="left out")


def test_the_commands(
    smallest: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = " ".join(stage_lines(Report.model_validate_json((packed / "report.json").read_text()).stages[0]))
    assert "codes packed (huffman): " in lines and "as planned (at most " in lines and "NOT" not in lines
    monkeypatch.setattr("llmshrink.checks.finished.check_reader", left_out)
    assert main(["verify", str(packed), "--quiet"]) == 0
    assert main(["cluster", str(smallest), "--pack", "--plan"]) == 0
    assert main(["factorize", str(smallest), "--bits", "3", "--pack", "--plan", "--json"]) == 0
    shown = capsys.readouterr().out
    assert "-> at most " in shown and '"bytes_are_bound": true' in shown
    assert main(["factorize", str(smallest), "--keep", "0.8", "--pack", "--plan"]) == 3
    assert "as low-rank nothing here has any" in capsys.readouterr().err
    assert main(["export", str(packed), "--to", "dense", "-o", str(tmp_path / "dense"), "--quiet"]) == 0
    assert main(["export", str(packed), "--to", "codebook", "-o", str(tmp_path / "plain"), "--quiet"]) == 0
    again = ["--pack", "-o", str(tmp_path / "again"), "--quiet"]
    assert main(["export", str(tmp_path / "plain"), "--to", "codebook", *again]) == 0
    assert settings(tmp_path / "plain")["format_version"] == 1
    assert settings(tmp_path / "again") == settings(packed)
    found, right = tensors(tmp_path / "again"), tensors(packed)
    assert found.keys() == right.keys() and all(torch.equal(found[key], right[key]) for key in right)
    streamed = StreamedModel(open_source(str(packed)), torch.device("cpu"))
    for key, tensor in tensors(tmp_path / "dense").items():
        assert torch.equal(tensor, streamed.weights.dense(key))


def test_max_size_is_asked_of_what_was_written(smallest: Path, packed: Path, text_file: Path, tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    gate = {"gate": {"max_size": f"{size}B"}}
    with pytest.raises(GateError, match="Nothing was computed"):
        made(smallest, tmp_path / "out", text_file, CLUSTERED, pack=False, **gate)
    (done,) = made(smallest, tmp_path / "out", text_file, CLUSTERED, **gate).stages
    assert [(found.value, found.passed) for found in done.gates] == [(size, True)]


def test_only_codes_are_packed(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    for name, method in (("dense", CLUSTERED), ("gguf", {"name": "rtn"}), ("sparse", {"name": "magnitude"})):
        with pytest.raises(RecipeError, match=f"codes of codebook and low-rank can be packed, those of {name} cannot"):
            recipe(smallest, tmp_path / "out", text_file, method, stage={"format": {"name": name, "pack": True}})
    with pytest.raises(PlanError, match="as low-rank nothing here has any"):
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, {"name": "svd", "rank": 8}))


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a later version": (lambda said: said.update(format_version=3), "version 3 is not known"),
    "another codec": (lambda said: said["packed"].update(codec="ans"), "packed as 'ans' are not known"),
    "of other bits": (lambda said: said["layers"]["lm_head"].update(bits=3, dim=2), "not those of|not for"),
    "a bomb": (lambda said: said["layers"]["lm_head"].update(shape=[1 << 24, 1 << 20]), "do not belong together"),
    "not packed": (lambda said: said["packed"].update(bytes={}), "lm_head|_proj"),
    "no codes": (lambda said: said["packed"]["bytes"].update({"lm_head.weight_table": 3}), "has no codes"),
    "nobody's": (lambda said: said["packed"].update(bytes=[]), "lm_head|_proj"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_settings_of_strangers(packed: Path, tmp_path: Path, attack: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(packed, folder)
    config = json.loads((folder / "config.json").read_text())
    change, expected = HOSTILE[attack]
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((InputError, PlanError), match=expected):
        weights = StreamedModel(open_source(str(folder)), torch.device("cpu")).weights
        for key in sorted(weights.compressed):
            weights.get(key)
    with pytest.raises((ValueError, RuntimeError)):
        load(folder)


def test_a_reader_that_knows_no_packing_fails_at_the_shape(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(packed, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["packed"]
    config["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch|size"):
        load(folder)
