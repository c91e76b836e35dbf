"""Clustered models from end to end: small files that load, exactly as planned, in every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, assert_loads_packed, close, content, decoded_model, load, logits, recipe
from safetensors.torch import load_file
from tiny import FAMILIES, config

from llmshrink import run
from llmshrink.cli import main
from llmshrink.errors import InterruptedRun, PlanError, RecipeError
from llmshrink.plugin import Packed
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe
from llmshrink.report.rows import stage_lines
from llmshrink.report.schema import Report

pytestmark = pytest.mark.usefixtures("without_reader")
WITHOUT = [name for name in FAMILIES if not hasattr(config(name), "num_experts_per_tok")]


def wanted(model: Path, out: Path, text: Path, stage: Any = None, **settings: Any) -> Recipe:
    return recipe(model, out, text, {"name": "kmeans", **settings}, stage=stage or {})


def cluster(model: Path, out: Path, text: Path, stage: Any = None, **settings: Any) -> Report:
    return run.execute(wanted(model, out, text, stage, **settings), progress=Silent())


@pytest.mark.parametrize("family", WITHOUT)
def test_transformers_loads_every_family(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    original, out = models_folder(family), tmp_path / "out"
    report = cluster(original, out, text_file, bits=3)
    (stage,) = report.stages
    assert stage.format == "codebook"
    treated = [layer for layer in stage.layers if layer.method]
    assert all(layer.bits == 3 and (layer.objective or 0) <= 1 for layer in treated)
    assert all(layer.bits_per_weight <= 3.5 for layer in treated)
    assert_loads_packed(stage, out, original, tmp_path / "again")


def test_one_other_code_is_seen(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    cluster(smallest, tmp_path / "out", text_file)
    model = load(tmp_path / "out")[0]
    right = logits(model)
    packed = next(module for module in model.modules() if isinstance(module, Packed))
    packed.get_buffer("weight")[3] ^= 0xF0
    assert not close(logits(model), right)


def test_export_gives_the_same_weights_dense(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    cluster(smallest, tmp_path / "codes", text_file, bits=4)
    assert main(["export", str(tmp_path / "codes"), "--to", "dense", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    dense = decoded_model(tmp_path / "codes", smallest).state_dict()
    for file in (tmp_path / "out").glob("*.safetensors"):
        for key, value in load_file(file).items():
            assert torch.equal(value.float(), dense[key].to(value.dtype).float())


@pytest.mark.parametrize(
    "settings", [{"bits": 2, "dim": 2}, {"bits": 2, "rows": -1, "weighting": "none", "outliers": 0.01}]
)
def test_a_stopped_run_gives_the_same_bytes(
    smallest: Path, text_file: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    cluster(smallest, tmp_path / "whole", text_file, **settings)
    with pytest.raises(InterruptedRun):
        run.execute(wanted(smallest, tmp_path / "out", text_file, **settings), progress=Stopping(note="block"))
    report = cluster(smallest, tmp_path / "out", text_file, **settings)
    assert report.stages[0].resumed_blocks == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_tables_and_codes_are_learned(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"reconstruct": {"steps": 30, "tokens": 192}}
    (done,) = cluster(smallest, tmp_path / "out", text_file, stage=stage, bits=2).stages
    assert sum(block.error_after for block in done.blocks) < 0.9 * sum(block.error_before for block in done.blocks)
    assert any((block.codes_changed or 0) > 0 for block in done.blocks)
    assert done.bytes_after == done.planned_bytes_after


def test_bits_are_chosen_to_a_size(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    allocate = {"bpw": 3.5, "candidates": [{"bits": 2}, {"bits": 3}, {"bits": 5}], "rows": 2, "length": 16}
    stage = {"allocate": allocate, "format": {"name": "codebook"}}
    data = wanted(smallest, tmp_path / "out", text_file, stage=stage, weighting="none")
    with pytest.raises(PlanError, match="bits per weight|smallest|no choice"):
        run.make_plan(data)  # embeddings and head are most of so small a model
    data = wanted(smallest, tmp_path / "out", text_file, stage={"allocate": {**allocate, "bpw": 20}}, weighting="none")
    (done,) = run.execute(data, progress=Silent()).stages
    assert done.allocation is not None


def test_the_command(smallest: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cluster", str(smallest), "--bits", "3", "-o", str(tmp_path / "out"), "--quiet"]
    arguments += ["--targets", "linears,embedding,head"]
    text = ["--calibration", str(text_file), "--samples", "8", "--length", "32"]
    quiet = ["--set", "evaluation.data=[]", "--set", "evaluation.speed=false"]
    assert main([*arguments, *text, *quiet]) == 0
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["format"] == "codebook" and all(entry["bits"] == 3 for entry in settings["layers"].values())
    assert {"model.embed_tokens", "lm_head"} <= settings["layers"].keys()
    report = Report.model_validate_json((tmp_path / "out/report.json").read_text())
    assert "kmeans (bits 3" in " ".join(stage_lines(report.stages[0]))
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    assert main(["cluster", str(smallest), "--preset", "fast", "--plan"]) == 0
    assert main(["cluster", str(smallest), "-r", "kmeans-w4", "--plan"]) == 0
    assert main(["cluster", str(smallest), "--set", "method.name=gptq", "--plan"]) == 3
    assert main(["cluster", str(smallest), "--bits", "9", "--plan"]) == 3
    assert main(["cluster", str(smallest), "--bits", "4", "--format", "gguf", "--plan"]) == 3
    assert "a method of `llmshrink quantize`, not of cluster" in capsys.readouterr().err


def test_refused_before_any_compute(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="rows 7 does not divide"):
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, rows=7))
    with pytest.raises(PlanError, match="256 values would stand for"):
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, bits=8, rows=1))
    with pytest.raises(RecipeError, match="inputs as they are"):
        wanted(smallest, tmp_path / "out", text_file, stage={"inputs": "int8"})


def test_experts_are_written_dense_and_told(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = cluster(models_folder("mixtral"), tmp_path / "out", text_file)
    assert report.stages[0].format == "dense"
    assert "default_format" in {event.kind for event in report.events}
