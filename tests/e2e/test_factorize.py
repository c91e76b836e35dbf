"""Factored models from end to end: small files that load, exactly as planned, in every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import ROUNDING, Stopping, assert_loads_packed, content, decoded_model, load, logits, recipe
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, build_model, config
from transformers import Qwen2MoeConfig

from llmshrink import run
from llmshrink.cli import main
from llmshrink.errors import InterruptedRun, PlanError, RecipeError
from llmshrink.plugin import Packed
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe
from llmshrink.report.rows import stage_lines
from llmshrink.report.schema import Report

pytestmark = pytest.mark.usefixtures("without_reader")
PRODUCTS = 4 * ROUNDING  # what is multiplied twice rounds once more
close = partial(helpers.close, rounding=PRODUCTS)
WITHOUT = [name for name in FAMILIES if not hasattr(config(name), "num_experts_per_tok")]


def wanted(model: Path, out: Path, text: Path, stage: Any = None, **settings: Any) -> Recipe:
    return recipe(model, out, text, {"name": "svdllm", **settings}, stage=stage or {})


def factorize(model: Path, out: Path, text: Path, stage: Any = None, **settings: Any) -> Report:
    return run.execute(wanted(model, out, text, stage, **settings), progress=Silent())


@pytest.mark.parametrize("family", WITHOUT)
def test_transformers_loads_every_family(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    original, out = models_folder(family), tmp_path / "out"
    (stage,) = factorize(original, out, text_file, stage={"ratios": None}).stages
    assert stage.format == "low-rank"
    treated = [layer for layer in stage.layers if layer.method]
    assert all(layer.rank and layer.bits is None for layer in treated)
    assert all(layer.bytes_after <= 0.8 * layer.bytes_before + 64 for layer in treated)
    assert_loads_packed(stage, out, original, tmp_path / "again", PRODUCTS)


@pytest.mark.parametrize(
    "settings", [{"rank": 5, "factor_bits": 8}, {"bits": 2, "rank": 2}, {"bits": 3, "pivots": True, "name": "svd"}]
)
def test_every_kind_loads(smallest: Path, text_file: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    (stage,) = factorize(smallest, tmp_path / "out", text_file, **settings).stages
    assert all(check.passed for check in stage.checks if check.name != "reader"), stage.checks
    assert stage.bytes_after == stage.planned_bytes_after
    layer = next(layer for layer in stage.layers if layer.method)
    assert layer.bits == settings.get("bits") and layer.rank == settings.get("rank", layer.rank)
    model = load(tmp_path / "out")[0]
    right = logits(decoded_model(tmp_path / "out", smallest))
    assert close(logits(model), right)
    packed = next(module for module in model.modules() if isinstance(module, Packed))
    packed.get_buffer("weight_right").zero_()
    assert not close(logits(model), right)


def test_ranks_are_found_and_said(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    (stage,) = factorize(smallest, tmp_path / "out", text_file, keep=0.7).stages
    assert stage.ratios is not None and stage.ratios.name == "spectrum"
    assert len(stage.ratios.units) == len({unit.layers for unit in stage.ratios.units})
    inside = [layer for layer in stage.layers if ".layers." in layer.name and len(layer.shape) == 2]
    before, after = (sum(getattr(layer, key) for layer in inside) for key in ("bytes_before", "bytes_after"))
    assert 0.6 * before < after <= 0.7 * before + 16 * len(inside)
    assert len({layer.rank for layer in inside}) > 1
    assert stage.bytes_after == stage.planned_bytes_after
    assert "spectrum" in " ".join(stage_lines(stage))
    equal = factorize(smallest, tmp_path / "equal", text_file, stage={"ratios": None}, keep=0.7).stages[0]
    assert len({layer.rank for layer in equal.layers if layer.shape == inside[0].shape and layer.method}) == 1


def test_ranks_by_weights_alone_need_no_text(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    report = factorize(smallest, tmp_path / "out", text_file, name="svd")
    assert report.calibration is None and report.stages[0].ratios is not None


def test_export_gives_the_same_weights_dense(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    factorize(smallest, tmp_path / "factors", text_file)
    assert main(["export", str(tmp_path / "factors"), "--to", "dense", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    dense = decoded_model(tmp_path / "factors", smallest).state_dict()
    for file in (tmp_path / "out").glob("*.safetensors"):
        for key, value in load_file(file).items():
            assert torch.equal(value.float(), dense[key].to(value.dtype).float())


@pytest.mark.parametrize("settings", [{}, pytest.param({"bits": 2, "rank": 2}, marks=pytest.mark.slow)])
def test_a_stopped_run_gives_the_same_bytes(
    smallest: Path, text_file: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    factorize(smallest, tmp_path / "whole", text_file, **settings)
    with pytest.raises(InterruptedRun):
        stopping = Stopping(step="compress", note="block")
        run.execute(wanted(smallest, tmp_path / "out", text_file, **settings), progress=stopping)
    report = factorize(smallest, tmp_path / "out", text_file, **settings)
    assert report.stages[0].resumed_blocks == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("settings", [{"keep": 0.5}, {"bits": 2, "rank": 2}])
def test_factors_and_tables_are_learned(
    smallest: Path, text_file: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    stage = {"reconstruct": {"steps": 30, "tokens": 192}}
    (done,) = factorize(smallest, tmp_path / "out", text_file, stage=stage, **settings).stages
    assert sum(block.error_after for block in done.blocks) < 0.95 * sum(block.error_before for block in done.blocks)
    assert done.bytes_after == done.planned_bytes_after


def test_the_command(smallest: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["factorize", str(smallest), "--keep", "0.6", "-o", str(tmp_path / "out"), "--quiet"]
    text = ["--calibration", str(text_file), "--samples", "8", "--length", "32"]
    quiet = ["--set", "evaluation.data=[]", "--set", "evaluation.speed=false"]
    assert main([*arguments, *text, *quiet]) == 0
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["format"] == "low-rank" and all(entry["pivots"] for entry in settings["layers"].values())
    report = Report.model_validate_json((tmp_path / "out/report.json").read_text())
    assert "svdllm (keep 0.6" in " ".join(stage_lines(report.stages[0]))
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["factorize", str(smallest), "--preset", "fast", "--plan"]) == 0
    assert main(["factorize", str(smallest), "-r", "svdllm-80", "--plan"]) == 0
    assert capsys.readouterr().out.count("spectrum finds") == 2
    assert main(["factorize", str(smallest), "--rank", "4", "--plan"]) == 0
    assert main(["factorize", str(smallest), "--bits", "2", "--plan"]) == 0
    assert "spectrum finds" not in capsys.readouterr().out
    assert main(["factorize", str(smallest), "--method", "gptq", "--plan"]) == 3
    assert main(["factorize", str(smallest), "--keep", "1.2", "--plan"]) == 3
    assert main(["factorize", str(smallest), "--rank", "4", "--format", "codebook", "--plan"]) == 3
    error = capsys.readouterr().err
    assert "a method of `llmshrink quantize`, not of factorize" in error and "less than 1" in error


def test_refused_before_any_compute(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="rank 4096 saves nothing: the largest that does is"):
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, rank=4096))
    with pytest.raises(PlanError, match="leaves no rank"):
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, stage={"ratios": None}, keep=0.001))
    with pytest.raises(RecipeError, match="inputs as they are"):
        wanted(smallest, tmp_path / "out", text_file, stage={"inputs": "int8"})
    with pytest.raises(RecipeError, match="`rank` says the rank"):
        wanted(smallest, tmp_path / "out", text_file, stage={"ratios": {}}, rank=4)


def test_what_no_rank_suits_is_left(text_file: Path, tmp_path: Path) -> None:
    """The gate of Qwen2-MoE's shared expert has one output."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "vocab_size": 160}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 2}
    experts = {"num_experts_per_tok": 1, "shared_expert_intermediate_size": 32}
    build_model(tmp_path / "model", Qwen2MoeConfig(**shape, **heads, **experts))
    report = factorize(tmp_path / "model", tmp_path / "out", text_file, name="svd")
    assert any(e.kind == "skipped" and "fewer numbers" in e.message for e in report.events)
    stage = report.stages[0]
    assert stage.ratios is not None and not any("shared_expert_gate" in unit.layers for unit in stage.ratios.units)


def test_layers_that_are_all_named_need_no_search(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"layers": {".*": {"rank": 4}}}
    report = factorize(smallest, tmp_path / "out", text_file, stage=stage, name="svd")
    assert {layer.rank for layer in report.stages[0].layers if layer.method} == {4}


def test_a_block_that_is_left_out_is_passed(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    report = factorize(smallest, tmp_path / "out", text_file, stage={"ignore": [r".*layers\.1\..*"]})
    assert {".layers.1." in layer.name for layer in report.stages[0].layers if layer.method} == {False}


def test_factors_in_codes_leave_no_matrix_dense(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    (stage,) = factorize(smallest, tmp_path / "out", text_file, name="svd", keep=0.9, factor_bits=8).stages
    assert all(layer.method for layer in stage.layers if ".layers." in layer.name and len(layer.shape) == 2)


def test_ranks_are_chosen_to_a_size(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    allocate = {"bpw": 31, "candidates": [{"keep": 0.3}, {"keep": 0.9}], "rows": 2, "length": 16}
    (stage,) = factorize(smallest, tmp_path / "out", text_file, stage={"allocate": allocate}, name="svd").stages
    assert stage.allocation is not None and stage.ratios is None
    with pytest.raises(RecipeError, match="give it `candidates`"):
        wanted(smallest, tmp_path / "out", text_file, stage={"allocate": {"bpw": 31}}, rank=4)


def test_experts_are_written_dense_and_told(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = factorize(models_folder("mixtral"), tmp_path / "out", text_file)
    assert report.stages[0].format == "dense"
    assert "default_format" in {event.kind for event in report.events}


# --- factors that blocks share


def shared(model: Path, out: Path, text: Path, stage: Any = None, **settings: Any) -> Report:
    return factorize(model, out, text, stage={"ratios": None, **(stage or {})}, **{"blocks": 2, **settings})


def homes(folder: Path) -> dict[str, str]:
    """Of each matrix that shares a factor, the one that stores it; by the settings in the file."""
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    return {name: entry["shared"] for name, entry in layers.items() if "shared" in entry}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_shared_factor_is_stored_and_loaded_once(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    original, out = models_folder(family), tmp_path / "out"
    (stage,) = shared(original, out, text_file).stages
    assert_loads_packed(stage, out, original, tmp_path / "again", PRODUCTS)
    lent = homes(out)
    assert len(lent) == len([layer for layer in stage.layers if layer.method]) and len(set(lent.values())) < len(lent)
    assert {layer.name: layer.shares for layer in stage.layers if layer.method} == lent
    stored = [name for file in out.glob("*.safetensors") for name in load_file(file) if name.endswith("_right")]
    assert sorted(stored) == sorted(f"{name}.weight_right" for name in set(lent.values()))
    model = load(out)[0]
    packed = {module.name: module for module in model.modules() if isinstance(module, Packed)}
    for name, home in lent.items():
        form = packed[name].form()
        assert form.right.weight.data_ptr() == packed[home].get_buffer("weight_right").data_ptr()
    right = logits(decoded_model(out, original))
    for home in set(lent.values()):
        packed[home].get_buffer("weight_right").mul_(1.5)
    assert not close(logits(model), right)
    copied = load(tmp_path / "again")[0]
    assert close(logits(deepcopy(copied)), right)
    assert len(copied.state_dict()) == len(load(out)[0].state_dict())
    plain = type(model).from_pretrained(out, dtype=torch.float32)
    plain.dequantize()
    assert not any(isinstance(module, Packed) for module in plain.modules()) and close(logits(plain), right)


def test_sharing_pays_where_blocks_look_at_the_same(text_file: Path, tmp_path: Path) -> None:
    """Blocks with the same weights gain by it, others are left alone; what is found is a recipe that does the same."""
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    build_model(tmp_path / "model", config("llama", num_hidden_layers=4, **small))
    file = next((tmp_path / "model").glob("*.safetensors"))
    tensors = load_file(file)
    same = {n: tensors[n.replace("layers.1.", "layers.0.")].clone() for n in tensors if "layers.1." in n}
    save_file({**tensors, **same}, file, metadata={"format": "pt"})
    report = factorize(tmp_path / "model", tmp_path / "out", text_file, blocks=2, keep=0.6)
    (stage,) = report.stages
    assert stage.bytes_after == stage.planned_bytes_after
    (event,) = [event for event in report.events if event.kind == "shared"]
    lent = homes(tmp_path / "out")
    treated = {layer.name for layer in stage.layers if layer.method}
    alike = {name for name in treated if ".layers.0." in name or ".layers.1." in name}
    assert alike <= lent.keys() and lent.keys() < treated
    assert event.data is not None and event.data["shared"] == len(set(lent.values())) and event.data["lost"] < 0.9
    alone = factorize(tmp_path / "model", tmp_path / "alone", text_file, keep=0.6).stages[0]
    off = [sum(layer.relative_error or 0 for layer in s.layers if layer.name in alike) for s in (stage, alone)]
    assert off[0] < 0.85 * off[1] and stage.bytes_after <= alone.bytes_after + 64
    recipe = str(tmp_path / "out/recipe.yaml")
    assert main(["factorize", "-r", recipe, "-o", str(tmp_path / "again"), "--quiet"]) == 0
    assert content(tmp_path / "again") == content(tmp_path / "out")


@pytest.mark.parametrize(("step", "note"), [("compress", "block"), ("make what blocks share", "block 1")])
def test_a_stopped_run_has_the_same_factors(
    smallest: Path, text_file: Path, tmp_path: Path, step: str, note: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    shared(smallest, whole, text_file)
    with pytest.raises(InterruptedRun):
        stopping = Stopping(step=step, note=note)
        run.execute(wanted(smallest, out, text_file, {"ratios": None}, blocks=2), progress=stopping)
    shared(smallest, out, text_file)
    assert content(out) == content(whole)


def test_shared_factors_are_verified_exported_and_not_learned(
    smallest: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    learned = shared(smallest, out, text_file, {"reconstruct": {"steps": 30, "tokens": 192}}, keep=0.5).stages[0]
    assert any(layer.reconstructed for layer in learned.layers)
    assert sum(b.error_after for b in learned.blocks) < 0.95 * sum(b.error_before for b in learned.blocks)
    assert main(["verify", str(out), "--quiet"]) == 0
    dense = decoded_model(out, smallest).state_dict()
    for to in ("dense", "low-rank"):
        assert main(["export", str(out), "--to", to, "-o", str(tmp_path / to), "--quiet"]) == 0
    for file in (tmp_path / "dense").glob("*.safetensors"):
        for key, value in load_file(file).items():
            assert torch.equal(value.float(), dense[key].to(value.dtype).float())
    assert homes(tmp_path / "low-rank") == homes(out)
    assert close(logits(load(tmp_path / "low-rank")[0]), logits(load(out)[0]))
    capsys.readouterr()
    assert main(["factorize", str(smallest), "-r", "svdllm-shared-80", "--plan"]) == 0


def test_sharing_is_refused_where_it_cannot_be(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="before any transform"):
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, {"transform": "awq", "ratios": None}, blocks=2))
    with pytest.raises(RecipeError, match="one layer at a time"):
        allocate = {"bpw": 20, "candidates": [{"keep": 0.5}, {"blocks": 2}]}
        wanted(smallest, tmp_path / "out", text_file, {"allocate": allocate})
    shared(smallest, tmp_path / "out", text_file)
    settings = json.loads((tmp_path / "out/config.json").read_text())
    entry = settings["quantization_config"]["layers"]["model.layers.1.mlp.up_proj"]
    entry["shared"] = "model.layers.7.mlp.up_proj"
    (tmp_path / "out/config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="which no matrix stores"):
        load(tmp_path / "out")


def test_experts_share_nothing(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    report = shared(models_folder("mixtral"), tmp_path / "out", text_file)
    treated = [layer for layer in report.stages[0].layers if layer.method]
    assert all((layer.shares is None) == ("expert" in layer.name) for layer in treated)


# --- matrices that become one


def alike_model(folder: Path) -> Path:
    """A Llama of four blocks, of which the first two have nearly the same weights."""
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    build_model(folder, config("llama", num_hidden_layers=4, **small))
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    for name in [name for name in tensors if "layers.1." in name]:
        first = tensors[name.replace("layers.1.", "layers.0.")]
        tensors[name] = first + 1e-3 * first.std() * tensors[name] / tensors[name].std().clamp(min=1e-6)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_what_is_most_alike_becomes_one(text_file: Path, tmp_path: Path) -> None:
    original, out = alike_model(tmp_path / "model"), tmp_path / "out"
    report = factorize(original, out, text_file, name="tie", keep=0.75)
    (stage,) = report.stages
    assert_loads_packed(stage, out, original, tmp_path / "again", PRODUCTS)
    tied = {name for name in homes(out) if ".layers." in name}
    assert tied == {layer.name for layer in stage.layers if ".layers.0." in layer.name or ".layers.1." in layer.name}
    (event,) = [event for event in report.events if event.kind == "tied"]
    assert event.data is not None and event.data["tied"] == 7 and event.data["sets"] == 14
    assert event.data["lost"] < 1e-4
    before, after = (sum(getattr(x, key) for x in stage.layers if x.method) for key in ("bytes_before", "bytes_after"))
    assert before / 2 < after < before / 2 + 8 * len(tied) + before / 100  # one of two, and which rows are its own
    packed = {module.name: module for module in load(out)[0].modules() if isinstance(module, Packed)}
    for name, home in homes(out).items():
        assert packed[name].form().right.weight.data_ptr() == packed[home].get_buffer("weight_right").data_ptr()
    again = ["factorize", "-r", str(out / "recipe.yaml"), "-o", str(tmp_path / "twice"), "--quiet"]
    assert main(again) == 0 and content(tmp_path / "twice") == content(out)


def test_all_become_one_but_the_lone(text_file: Path, tmp_path: Path) -> None:
    original, out = alike_model(tmp_path / "model"), tmp_path / "out"
    report = factorize(original, out, text_file, {"ratios": None}, name="tie", blocks=3)
    (stage,) = report.stages
    assert stage.bytes_after == stage.planned_bytes_after
    alone = [layer.name for layer in stage.layers if not layer.method]
    assert len(alone) == 7 and all(".layers.3." in name for name in alone)
    assert any(event.kind == "skipped" and "no other of its name" in event.message for event in report.events)
    lent = homes(out)
    assert len(lent) == 21 and set(lent.values()) == {name for name in lent if ".layers.0." in name}
    assert_loads_packed(stage, out, original, tmp_path / "again", PRODUCTS)


@pytest.mark.parametrize("settings", [{"name": "tie"}, {"blocks": 2}])
def test_a_smoke_run_has_all_blocks_that_share(
    smallest: Path, text_file: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    seen: list[str] = []

    class Noting(Silent):
        def start(self, step: str, total: int, done: int = 0) -> None:
            seen.append(step)

    checks = run.smoke(wanted(smallest, tmp_path / "out", text_file, {"ratios": None}, **settings), progress=Noting())
    assert "make what blocks share" in seen and all(check.passed is not False for check in checks)


def test_tying_is_planned_stopped_and_refused(
    smallest: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_ = wanted(smallest, tmp_path / "whole", text_file, name="tie", keep=0.7)
    planned, done = run.make_plan(recipe_), run.execute(recipe_, progress=Silent()).stages[0]
    assert planned.ratios is not None and planned.ratios.name == "similarity"
    assert planned.bytes_after < planned.bytes_before and done.bytes_after == done.planned_bytes_after
    with pytest.raises(InterruptedRun):
        again = wanted(smallest, tmp_path / "out", text_file, name="tie", keep=0.7)
        run.execute(again, progress=Stopping(step="compress", note="block"))
    run.execute(again, progress=Silent())
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    with pytest.raises(PlanError, match="of the numbers are left"):
        run.make_plan(wanted(smallest, tmp_path / "no", text_file, name="tie", keep=0.3))
    with pytest.raises(PlanError, match="none that it can"):
        run.make_plan(wanted(smallest, tmp_path / "no", text_file, {"reconstruct": {}}, name="tie"))
    with pytest.raises(RecipeError, match="of tie it is similarity"):
        wanted(smallest, tmp_path / "no", text_file, {"ratios": {"name": "spectrum"}}, name="tie")
    with pytest.raises(RecipeError, match="one layer at a time"):
        wanted(smallest, tmp_path / "no", text_file, {"allocate": {"bpw": 20}}, name="tie")
    with pytest.raises(RecipeError, match="leave out `keep`"):
        wanted(smallest, tmp_path / "no", text_file, {"ratios": None}, name="tie", keep=0.7)
    capsys.readouterr()
    assert main(["factorize", str(smallest), "-r", "tie-90", "--set", "method.keep=0.7", "--plan"]) == 0
    assert "one choice that saves as much" in " ".join(capsys.readouterr().out.split())
