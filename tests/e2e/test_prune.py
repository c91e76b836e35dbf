"""Pruned models from end to end: smaller files that load, exactly as planned, and zeros that stay zeros."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, assert_loads_packed, close, content, decoded_model, load, logits, recipe
from safetensors.torch import load_file
from tiny import FAMILIES, config
from transformers import AutoModelForCausalLM

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


def prune(model: Path, out: Path, text: Path, name: str = "wanda", stage: Any = None, **settings: Any) -> Report:
    return run.execute(wanted(model, out, text, name, stage, **settings), progress=Silent())


def wanted(model: Path, out: Path, text: Path, name: str = "wanda", stage: Any = None, **settings: Any) -> Recipe:
    return recipe(model, out, text, {"name": name, **settings}, stage=stage or {})


@pytest.mark.parametrize("family", WITHOUT)
def test_transformers_loads_every_family(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    original, out = models_folder(family), tmp_path / "out"
    report = prune(original, out, text_file, sparsity=0.5)
    (stage,) = report.stages
    assert stage.format == "sparse"
    treated = [layer for layer in stage.layers if layer.method]
    assert all(layer.zeros == layer.parameters // 2 for layer in treated)
    assert sum(layer.bytes_after for layer in treated) <= 0.57 * sum(layer.bytes_before for layer in treated) + 1
    assert_loads_packed(stage, out, original, tmp_path / "again")


@pytest.mark.parametrize(
    "method", [{"name": "sparsegpt", "bits": 4, "group_size": 32}, {"name": "sparsegpt", "pattern": "2:4"}]
)
def test_codes_and_patterns_load_too(smallest: Path, text_file: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    name = method.pop("name")
    report = prune(smallest, tmp_path / "out", text_file, name, **method)
    assert report.stages[0].bytes_after == report.stages[0].planned_bytes_after
    assert close(logits(load(tmp_path / "out")[0]), logits(decoded_model(tmp_path / "out", smallest)))


def test_without_llmshrink_it_does_not_load(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    prune(smallest, tmp_path / "out", text_file)
    load_it = f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    code = f"""
from transformers import AutoModelForCausalLM
try:
    {load_it}
except RuntimeError:
    pass
else:
    raise AssertionError("it loads")
import llmshrink  # transformers has its quantizers already; elsewhere in these tests llmshrink comes first
{load_it}
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "shape" in done.stderr, done.stderr


def test_it_can_be_made_dense_while_loading(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(smallest, out, text_file)
    right = logits(load(out)[0])
    settings = json.loads((out / "config.json").read_text())
    settings["quantization_config"]["dequantize"] = True
    (out / "config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert not any(isinstance(module, Packed) for module in model.modules())
    assert close(logits(model), right)


def test_export_gives_the_same_weights_dense(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    prune(smallest, tmp_path / "sparse", text_file)
    prune(smallest, tmp_path / "dense", text_file, stage={"format": {"name": "dense"}})
    assert main(["export", str(tmp_path / "sparse"), "--to", "dense", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    one, other = (
        {k: v for f in sorted((tmp_path / d).glob("*.safetensors")) for k, v in load_file(f).items()}
        for d in ("out", "dense")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_pruned_model_is_quantized_with_its_zeros(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    prune(smallest, tmp_path / "pruned", text_file, sparsity=0.6)
    quantized = recipe(tmp_path / "pruned", tmp_path / "out", text_file, {"name": "gptq", "bits": 4, "group_size": 32})
    (stage,) = run.execute(quantized, progress=Silent()).stages
    treated = [layer for layer in stage.layers if layer.method]
    assert all((layer.zeros or 0) >= round(0.6 * layer.shape[1]) * layer.shape[0] for layer in treated)


@pytest.mark.parametrize("stored", ["sparse", "dense"])
def test_what_is_kept_is_learned_and_what_is_dropped_stays_so(
    smallest: Path, text_file: Path, tmp_path: Path, stored: str
) -> None:
    stage = {"reconstruct": {"steps": 20, "tokens": 192}, "format": {"name": stored}}
    (done,) = prune(smallest, tmp_path / "out", text_file, stage=stage, sparsity=0.6).stages
    assert sum(block.error_after for block in done.blocks) < 0.95 * sum(block.error_before for block in done.blocks)
    (plain,) = prune(smallest, tmp_path / "plain", text_file, stage={"format": {"name": stored}}, sparsity=0.6).stages
    assert [layer.zeros for layer in done.layers] == [layer.zeros for layer in plain.layers]


def test_zeros_survive_learned_codes(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    prune(smallest, tmp_path / "pruned", text_file, sparsity=0.6)
    stage = {"reconstruct": {"steps": 20, "tokens": 192}}
    method = {"name": "gptq", "bits": 4, "group_size": 32}
    (done,) = run.execute(
        recipe(tmp_path / "pruned", tmp_path / "out", text_file, method, stage=stage), progress=Silent()
    ).stages
    assert any(block.error_after < block.error_before for block in done.blocks)
    treated = [layer for layer in done.layers if layer.method]
    assert all((layer.zeros or 0) >= round(0.6 * layer.shape[1]) * layer.shape[0] for layer in treated)


@pytest.mark.parametrize(
    ("stage", "kept"),
    [
        ({"method": {"name": "rtn", "bits": 4, "group_size": 32}}, True),
        ({"method": {"name": "gptq"}, "format": {"name": "gguf", "type": "Q4_0"}}, True),
        ({"method": {"name": "gptq"}, "format": {"name": "gguf", "type": "Q4_1"}}, False),
        ({"method": {"name": "rtn", "bits": 4, "group_size": 32}, "transform": [{"name": "hadamard"}]}, False),
    ],
)
def test_zeros_stay_or_it_is_told(
    smallest: Path, text_file: Path, tmp_path: Path, stage: dict[str, Any], kept: bool
) -> None:
    prune(smallest, tmp_path / "pruned", text_file, "magnitude", stage={"format": {"name": "dense"}}, sparsity=0.6)
    report = run.execute(recipe(tmp_path / "pruned", tmp_path / "out", text_file, stage=stage), progress=Silent())
    told = {event.layer for event in report.events if event.kind == "zeros_lost"}
    treated = [layer for layer in report.stages[0].layers if layer.method]
    inside = [layer for layer in treated if ".layers." in layer.name]
    lost = {layer.name for layer in inside if (layer.zeros or 0) < 0.59 * layer.parameters}
    assert lost <= told
    assert bool(told) is not kept


def test_experts_are_written_dense_and_told(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = prune(models_folder("mixtral"), tmp_path / "out", text_file)
    assert report.stages[0].format == "dense"
    assert "default_format" in {event.kind for event in report.events}
    with pytest.raises(PlanError, match="fuses experts"):
        run.make_plan(
            wanted(models_folder("mixtral"), tmp_path / "out", text_file, stage={"format": {"name": "sparse"}})
        )


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_a_stopped_run_gives_the_same_bytes(smallest: Path, text_file: Path, tmp_path: Path, name: str) -> None:
    prune(smallest, tmp_path / "whole", text_file, name)
    with pytest.raises(InterruptedRun):
        run.execute(wanted(smallest, tmp_path / "out", text_file, name), progress=Stopping(note="block"))
    report = prune(smallest, tmp_path / "out", text_file, name)
    assert report.stages[0].resumed_blocks == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_layers_get_their_own_share(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"layers": {r".*down_proj": {"sparsity": 0.25}, r".*o_proj": None}}
    report = prune(smallest, tmp_path / "out", text_file, stage=stage)
    shares = {layer.name.rpartition(".")[2]: (layer.zeros or 0) / layer.parameters for layer in report.stages[0].layers}
    assert shares["down_proj"] == 0.25 and shares["o_proj"] == 0 and shares["up_proj"] == 0.5
    assert any("of their weights are zero" in line for line in stage_lines(report.stages[0]))


def test_shares_are_allocated_to_a_size(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"allocate": {"size": "60%", "rows": 2, "length": 12}}
    report = prune(smallest, tmp_path / "out", text_file, "magnitude", stage=stage)
    (done,) = report.stages
    assert done.allocation is not None and done.allocation.bytes <= done.allocation.asked_bytes
    assert len({(layer.zeros or 0) / layer.parameters for layer in done.layers if layer.method}) > 1


def shares_of(report: Report) -> dict[str, float]:
    return {layer.name: (layer.zeros or 0) / layer.parameters for layer in report.stages[0].layers if layer.method}


def test_blocks_with_more_outliers_keep_more(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {
        "ratios": {"name": "owl", "threshold": 2, "spread": 0.1},
        "layers": {r".*1\.mlp\.down_proj": {"sparsity": 0.25}},
    }
    report = prune(smallest, tmp_path / "out", text_file, stage=stage, sparsity=0.6, per="matrix")
    (done,) = report.stages
    found, shares = done.ratios, shares_of(report)
    assert found is not None and [unit.outliers is not None for unit in found.units] == [True, True]
    assert shares.pop("model.layers.1.mlp.down_proj") == 0.25
    for number, unit in enumerate(found.units):
        own = [share for name, share in shares.items() if f"layers.{number}." in name]
        assert own == pytest.approx([unit.sparsity] * len(own), abs=1e-3)  # but for whole weights
    first, second = found.units
    assert abs(first.sparsity - second.sparsity) == pytest.approx(0.2)
    assert (first.sparsity < second.sparsity) == ((first.outliers or 0) > (second.outliers or 0))
    sizes = {layer.name: layer.parameters for layer in done.layers}
    gone = sum(share * sizes[name] for name, share in shares.items())
    assert gone == pytest.approx(0.6 * sum(sizes[name] for name in shares), abs=len(shares))
    assert done.method["sparsity"] == 0.6 and "owl" in " ".join(stage_lines(done))
    assert done.bytes_after == done.planned_bytes_after
    assert "sparsity: 0.25" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_the_smallest_weights_of_all_go(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    """Without any text."""
    report = prune(smallest, tmp_path / "out", text_file, "magnitude", {"ratios": {"name": "global"}}, sparsity=0.4)
    (done,) = report.stages
    assert report.calibration is None and done.ratios is not None and done.ratios.threshold is not None
    total = sum(layer.parameters for layer in done.layers if layer.method)
    assert sum(layer.zeros or 0 for layer in done.layers) == pytest.approx(0.4 * total, abs=len(done.layers))
    kept, whole = decoded_model(tmp_path / "out", smallest), load(smallest)[0]
    pruned = [name for name, weight in kept.named_parameters() if name.removesuffix(".weight") in shares_of(report)]
    assert len(pruned) == len(shares_of(report)) and len(set(shares_of(report).values())) > 2
    for name in pruned:
        before, after = whole.get_parameter(name).detach().abs(), kept.get_parameter(name).detach()
        edge, slack = done.ratios.threshold, 1.01  # of a small matrix a share is whole weights
        assert float(before[after == 0].max()) <= edge * slack and float(before[after != 0].min()) * slack >= edge


@pytest.mark.parametrize("step", ["find", "compress"])
def test_a_run_stopped_while_shares_are_found_or_used_gives_the_same_bytes(
    smallest: Path, text_file: Path, tmp_path: Path, step: str
) -> None:
    stage = {"ratios": {"name": "owl", "threshold": 2}}
    prune(smallest, tmp_path / "whole", text_file, stage=stage)
    with pytest.raises(InterruptedRun):
        run.execute(
            wanted(smallest, tmp_path / "out", text_file, stage=stage), progress=Stopping(step=step, note="block")
        )
    report = prune(smallest, tmp_path / "out", text_file, stage=stage)
    assert report.stages[0].resumed_blocks == (step == "compress")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_cannot_be_is_refused(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    def plan(**stage: Any) -> None:
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, stage=stage))

    with pytest.raises(RecipeError) as found:
        plan(format={"name": "gguf"})
    assert "quantize the result" in str(found.value.problems)
    with pytest.raises(RecipeError) as found:
        plan(method={"name": "gptq"})
    assert "a method of `llmshrink quantize`" in str(found.value.problems)
    with pytest.raises(RecipeError) as found:
        recipe(smallest, tmp_path / "out", text_file, {"name": "gptq"}, stage={"layers": {".*": {"name": "wanda"}}})
    assert "a method of `llmshrink prune`" in str(found.value.problems)
    with pytest.raises(PlanError, match="compressed-tensors"):
        plan(format={"name": "compressed-tensors"})
    with pytest.raises(PlanError, match="does not divide the width"):
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, pattern="3:7"))


def test_at_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--method", "magnitude", "--sparsity", "0.3", "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["method"] == "magnitude" and plan["format"] == "sparse"
    assert main(["prune", "--ratios", "owl", "--plan"]) == 0
    assert "owl finds" in capsys.readouterr().out
    assert main(["prune", "--ratios", "global", "--plan"]) == 3
    assert "for method magnitude" in capsys.readouterr().err
    assert main(["prune", "--sparsity", "1.5", "--plan"]) == 3
    assert "less than 1" in capsys.readouterr().err
    assert main(["prune", "-r", "gptq-w4g128", "--plan"]) == 2
