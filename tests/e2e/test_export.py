"""Codes stored in one format, by whatever tool, written in another; and what else such a folder is good for."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, assert_complete, content, decoded_model, logits, recipe
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmshrink import run
from llmshrink.errors import InterruptedRun, PlanError
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe

SYMMETRIC = {"name": "rtn", "bits": 4, "group_size": 32}
ASYMMETRIC = {**SYMMETRIC, "symmetric": False}
NF4 = {"name": "nf4", "block_size": 32}
STORED = [
    ("gptq", SYMMETRIC),
    ("gptq", ASYMMETRIC),
    ("awq", ASYMMETRIC),
    ("compressed-tensors", SYMMETRIC),
    ("compressed-tensors", {**ASYMMETRIC, "bits": 3, "group_size": -1}),
    ("bnb", {**NF4, "double_quant": True}),
]
GOES = {
    "gptq": {"gptq", "awq", "compressed-tensors", "dense"},
    "awq": {"gptq", "awq", "compressed-tensors", "dense"},
    "compressed-tensors": {"gptq", "awq", "compressed-tensors", "dense"},
    "bnb": {"bnb", "dense"},
}


def export(model: Path, to: str, output: Path, **more: Any) -> Recipe:
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{"task": "export", "format": {"name": to}}],
            "evaluation": {"data": [], "speed": False},
            "output": str(output),
            **more,
        }
    )


def weights(folder: Path) -> dict[str, Tensor]:
    """Every matrix of the blocks as llmshrink decodes it."""
    model = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    return {m.key: model.weights.get(m.key).float() for block in model.anatomy.blocks for m in block.matrices}


@pytest.fixture(scope="module")
def stored(
    models_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function format, method, family -> a folder stored like that, made once, without what only llmshrink adds."""
    root = tmp_path_factory.mktemp("stored")

    def folder(fmt: str, method: dict[str, Any], family: str = "llama") -> Path:
        path = root / f"{family}-{fmt}-{'-'.join(map(str, method.values()))}"
        if not path.exists():
            source = models_folder(family, torch.float16)
            run.execute(recipe(source, path, text_file, method, stage={"format": {"name": fmt}}), progress=Silent())
            for name in ("llmshrink-manifest.json", "report.json", "recipe.yaml", "README.md"):
                (path / name).unlink()
        return path

    return folder


@pytest.mark.usefixtures("without_reader")
@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors", "bnb", "dense"])
@pytest.mark.parametrize(
    ("fmt", "method"), STORED, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_the_same_codes(stored: Callable[..., Path], tmp_path: Path, fmt: str, method: dict[str, Any], to: str) -> None:
    source, out = stored(fmt, method), tmp_path / "out"
    fits = to in GOES[fmt] and not (to == "awq" and method.get("bits") == 3)
    if not fits:
        with pytest.raises(PlanError, match=f"14 layers .*: format {to}|format {to}: 14 layers"):
            run.execute(export(source, to, out), progress=Silent())
        assert not out.exists()
        return
    report = run.execute(export(source, to, out), progress=Silent())
    assert_complete(out)
    before, after = weights(source), weights(out)
    rounding = 2**-10 if to == "dense" else 0.0  # a decoded weight has more digits than float16
    for key, weight in before.items():
        assert (after[key] - weight).norm() <= rounding * weight.norm()
    stage = report.stages[0]
    assert stage.task == "export" and all(layer.method == "keep" for layer in stage.layers)
    assert stage.bytes_before == StreamedModel(open_source(str(source)), torch.device("cpu")).source.checkpoint.bytes
    assert stage.bytes_after == stage.planned_bytes_after
    assert [event.kind for event in report.events] == (["rounded"] if to == "dense" else [])
    config = json.loads((out / "config.json").read_bytes())
    assert (to == "dense") == ("quantization_config" not in config)


@pytest.mark.parametrize(
    ("family", "fmt", "method"),
    [
        ("gemma2", "gptq", ASYMMETRIC),
        ("gpt2", "bnb", NF4),
        ("mixtral", "compressed-tensors", SYMMETRIC),
        ("opt", "awq", SYMMETRIC),
    ],
)
def test_dense_folders_load_in_plain_transformers(
    stored: Callable[..., Path], tmp_path: Path, family: str, fmt: str, method: dict[str, Any]
) -> None:
    source, out = stored(fmt, method, family), tmp_path / "out"
    report = run.execute(export(source, "dense", out), progress=Silent())
    assert {check.name: check.passed for check in report.stages[0].checks}["reader"]
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    theirs, ours = logits(model.eval()), logits(decoded_model(source, out))
    assert (theirs - ours).abs().max() <= 0.02 * ours.std(), "apart from float16"


def reordered(folder: Path, copy: Path) -> dict[str, Tensor]:
    """A folder as older tools left it: groups of scattered inputs, settings beside config.json, biases of zero.

    Returns:
        What its matrices mean, by a formula of its own.
    """
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_bytes())
    old = config.pop("quantization_config")
    settings = {k: old[k] for k in ("bits", "group_size", "damp_percent", "sym", "true_sequential")}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "quantize_config.json").write_text(json.dumps({**settings, "desc_act": True, "model_name_or_path": None}))
    (copy / "model.safetensors.index.json").unlink()
    tensors: dict[str, Tensor] = {}
    for path in sorted(copy.glob("*.safetensors")):
        tensors |= {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
    meaning = {}
    for number, name in enumerate(sorted(n.removesuffix(".g_idx") for n in tensors if n.endswith(".g_idx"))):
        groups = tensors[f"{name}.g_idx"]
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(number))].contiguous()
        tensors[f"{name}.g_idx"] = groups
        tensors[f"{name}.bias"] = torch.zeros(tensors[f"{name}.scales"].shape[1], dtype=torch.float16)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = (tensors[f"{name}.qweight"][:, None] >> shifts[:, None] & 15).flatten(0, 1)
        zeros = (tensors[f"{name}.qzeros"][..., None] >> shifts & 15).flatten(1) + 1
        scales, zeros = tensors[f"{name}.scales"].float()[groups.long()], zeros[groups.long()]
        meaning[f"{name}.weight"] = (scales * (codes - zeros)).T
    save_file(tensors, copy / "gptq_model-4bit-32g.safetensors", metadata={"format": "pt"})
    return meaning


def test_a_folder_of_an_older_tool(
    stored: Callable[..., Path], other_text: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    meaning = reordered(stored("gptq", ASYMMETRIC), folder)
    assert all(torch.equal(weight, meaning[key]) for key, weight in weights(folder).items()) and len(meaning) == 14
    # It can be measured,
    data = {
        "version": 1,
        "model": {"id": str(folder)},
        "stages": [{"task": "eval"}],
        "evaluation": {"data": [str(other_text)], "rows": 4, "length": 48, "speed": False},
    }
    measured = run.execute(validate(data), progress=Silent())
    assert measured.before is not None and measured.before.scores[0].perplexity > 1
    # read as dense weights by plain transformers,
    report = run.execute(export(folder, "dense", tmp_path / "dense"), progress=Silent())
    assert [event.kind for event in report.events] == ["unused_tensors", "rounded"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"] and all(name.endswith(".bias") for name in info["unexpected_keys"])
    for name, weight in model.named_parameters():
        assert name not in meaning or torch.equal(weight, meaning[name].half())
    # compressed again, which starts from what its codes mean,
    again = recipe(folder, tmp_path / "again", text_file, {"name": "gptq", "bits": 3, "group_size": 32})
    report = run.execute(again, progress=Silent())
    assert "requantized" in [event.kind for event in report.events]
    error = (
        weights(tmp_path / "again")["model.layers.0.mlp.up_proj.weight"] - meaning["model.layers.0.mlp.up_proj.weight"]
    )
    assert 0 < error.norm() / meaning["model.layers.0.mlp.up_proj.weight"].norm() < 0.3
    assert not (tmp_path / "again" / "quantize_config.json").exists()
    # and not written with groups that no other format has.
    with pytest.raises(PlanError, match="groups? of adjacent inputs"):
        run.execute(export(folder, "gptq", tmp_path / "no"), progress=Silent())


def test_layers_that_a_second_recipe_leaves_become_dense(
    stored: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source, out = stored("gptq", SYMMETRIC), tmp_path / "out"
    wanted = recipe(
        source, out, text_file, {"name": "rtn", "bits": 8, "group_size": 32}, stage={"ignore": [".*down_proj"]}
    )
    report = run.execute(wanted, progress=Silent())
    assert [event.kind for event in report.events] == ["requantized", "decompressed"]
    assert all(check.passed for check in report.stages[0].checks)
    down = {layer.name: layer for layer in report.stages[0].layers if layer.name.endswith("down_proj")}
    assert all(layer.method is None and layer.bytes_after > layer.bytes_before for layer in down.values())
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (logits(model.eval()) - logits(decoded_model(source, out))).abs().max() < 0.2


def test_the_model_samples_its_own_text_though_no_package_reads_it(
    stored: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = stored("awq", ASYMMETRIC)
    wanted = recipe(source, tmp_path / "out", text_file, SYMMETRIC | {"name": "gptq"}, calibration={"data": "self"})
    report = run.execute(wanted, progress=Silent())
    assert report.calibration is not None and report.calibration.data == "self"


@pytest.mark.usefixtures("without_reader")
def test_a_stopped_export_goes_on(stored: Callable[..., Path], tmp_path: Path) -> None:
    class Stopping(Silent):
        def advance(self, amount: int, note: str = "") -> None:
            if note.startswith("block 0"):
                os.kill(os.getpid(), signal.SIGTERM)

    wanted = export(stored("gptq", SYMMETRIC), "awq", tmp_path / "out", run=SMALL["run"])
    run.execute(wanted, progress=Silent())
    whole = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InterruptedRun):
        run.execute(wanted, progress=Stopping())
    report = run.execute(wanted, progress=Silent())
    assert report.stages[0].resumed_blocks == 1 and content(tmp_path / "out") == whole


def test_a_dense_model_has_nothing_to_export(models_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nothing to export"):
        run.execute(export(models_folder("llama"), "gptq", tmp_path / "out"), progress=Silent())


def test_the_plan_knows_every_byte(stored: Callable[..., Path], tmp_path: Path) -> None:
    plan = run.make_plan(export(stored("gptq", SYMMETRIC), "compressed-tensors", tmp_path / "out"))
    report = run.execute(export(stored("gptq", SYMMETRIC), "compressed-tensors", tmp_path / "out"), progress=Silent())
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert plan.file_bytes == sizes and plan.bytes_after == report.stages[0].bytes_after
