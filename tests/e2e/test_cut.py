"""Models that parts were cut out of, from end to end: smaller tensors, which load wherever the whole model does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, content, load, logits
from plain import Plain
from tiny import LIKE_LLAMA, build_model, config
from transformers import Glm4MoeConfig, MiniCPM3Config

from llmshrink import run
from llmshrink.cli import main
from llmshrink.errors import InterruptedRun, LlmshrinkError, PlanError, RecipeError, UsageError
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe
from llmshrink.report.rows import stage_lines
from llmshrink.report.schema import Report

reader = pytest.mark.usefixtures("without_reader")


def wanted(model: Path, out: Path, text: Path, **cut: Any) -> Recipe:
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{"task": "prune", "cut": cut}],
            "calibration": {"data": str(text), "samples": 12, "length": 48},
            "evaluation": {"data": [], "speed": False},
            "run": {"threads": 2, "batch_tokens": 192},
            "output": str(out),
        }
    )


def made(model: Path, out: Path, text: Path, **cut: Any) -> Report:
    return run.execute(wanted(model, out, text, **cut), progress=Silent())


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A Llama of four layers."""
    build_model(tmp_path / "deep", config("llama", num_hidden_layers=4))
    return tmp_path / "deep"


@pytest.fixture(scope="module")
def plain() -> Iterator[Plain]:
    """Transformers without llmshrink."""
    with Plain() as process:
        yield process


@pytest.mark.parametrize(
    ("family", "cut"),
    [
        ("llama", {"neurons": "75%", "heads": "50%", "hidden": 48}),
        pytest.param("llama-tied", {"hidden": "75%"}, marks=pytest.mark.slow),
        ("gpt2", {"neurons": 128, "layers": 1}),
        ("phi3", {"neurons": 64, "heads": 2}),
        pytest.param("gemma2", {"neurons": 96, "layers": [1]}, marks=pytest.mark.slow),
        ("opt", {"neurons": "50%"}),
        pytest.param("qwen2", {"heads": 2, "layers": 1}, marks=pytest.mark.slow),
        pytest.param("mixtral", {"heads": 2, "experts": 3}, marks=pytest.mark.slow),
        ("qwen3-moe", {"experts": "50%"}),
    ],
)
def test_plain_transformers_loads_what_is_left(
    plain: Plain,
    models_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    family: str,
    cut: dict[str, Any],
) -> None:
    out = tmp_path / "out"
    report = made(models_folder(family), out, text_file, **cut)
    (stage,) = report.stages
    assert all(check.passed for check in stage.checks), stage.checks  # the reader's logits are the engine's
    assert {"blocks", "reader", "copied"} <= {check.name for check in stage.checks}
    assert stage.bytes_after == stage.planned_bytes_after < stage.bytes_before
    assert stage.cut is not None
    (candidate, *_) = stage.cut.candidates
    model, _ = load(out)
    assert sum(p.numel() for p in model.parameters()) == candidate.parameters
    assert torch.allclose(plain.logits(out), logits(model), atol=1e-4)
    assert any("kept" in line for line in stage_lines(stage))
    assert main(["verify", str(out), "--quiet"]) == 0


OTHERS: list[dict[str, Any]] = [{"hidden": 48}, {"heads": 2}]


@reader
@pytest.mark.parametrize(
    "cut", [{"neurons": 96}, {"layers": 3}, *(pytest.param(c, marks=pytest.mark.slow) for c in OTHERS)]
)
def test_repair_brings_it_nearer(deep: Path, other_text: Path, tmp_path: Path, cut: dict[str, Any]) -> None:
    kl = {}
    for repair in (True, False):
        data = wanted(deep, tmp_path / str(repair), other_text, **cut, repair=repair).model_dump(mode="json")
        data["evaluation"] |= {"data": [str(other_text)], "rows": 8, "length": 48}
        data["calibration"] |= {"samples": 100}
        report = run.execute(validate(data), progress=Silent())
        (stage,) = report.stages
        assert bool(stage.blocks) is repair
        assert stage.cut is not None and bool(stage.cut.repaired) is repair
        assert report.after is not None and report.after.scores[0].kl is not None
        kl[repair] = report.after.scores[0].kl
    assert kl[True] < 0.9 * kl[False]


@reader
@pytest.mark.parametrize("cut", [pytest.param({"neurons": 96}, marks=pytest.mark.slow), {"layers": 3}])
def test_learning_brings_it_nearer_still(deep: Path, other_text: Path, tmp_path: Path, cut: dict[str, Any]) -> None:
    data = wanted(deep, tmp_path / "out", other_text, **cut).model_dump(mode="json")
    data["calibration"] |= {"samples": 100}
    left = {}
    for steps in (None, 40):
        data["stages"][0]["reconstruct"] = steps and {"steps": steps, "tokens": 384}
        data["output"] = str(tmp_path / str(steps))
        (stage,) = run.execute(validate(data), progress=Silent()).stages
        left[steps] = sum(block.error_after for block in stage.blocks)
    assert left[40] < 0.97 * left[None]


@reader
def test_what_was_pruned_stays_zero(deep: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = [
        "prune",
        str(deep),
        "--method",
        "magnitude",
        "--format",
        "dense",
        "-o",
        str(tmp_path / "half"),
        "--quiet",
    ]
    assert main([*arguments, "--set", "evaluation.data=[]", "--set", "evaluation.speed=false"]) == 0
    report = made(tmp_path / "half", tmp_path / "out", text_file, neurons=96, layers=3)
    assert "zeros_lost" not in {event.kind for event in report.events}
    assert any(layer.reconstructed for layer in report.stages[0].layers)
    for layer in load(tmp_path / "out")[0].model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert 0.4 < float((linear.weight == 0).float().mean()) < 0.6


@reader
def test_all_that_is_left_untouched_is_the_originals(deep: Path, text_file: Path, tmp_path: Path) -> None:
    (stage,) = made(deep, tmp_path / "out", text_file, layers=[0, 1, 3], damp=0.1).stages
    assert stage.cut is not None and stage.cut.candidates[0].layers == [0, 1, 3]
    whole, left = load(deep)[0].model.layers, load(tmp_path / "out")[0].model.layers
    # What lies before the gap gives what it gave; from its last linear on there is something to make up for.
    fitted = {(1, "mlp.down_proj.weight"), (2, "self_attn.o_proj.weight"), (2, "mlp.down_proj.weight")}
    for new, old in enumerate((0, 1, 3)):
        for name, weight in left[new].named_parameters():
            assert torch.equal(weight, whole[old].get_parameter(name)) is ((new, name) not in fitted), (new, name)
    report = {layer.name: layer for layer in stage.layers}
    assert report["model.layers.1.mlp.up_proj"].relative_error == 0
    assert report["model.layers.1.mlp.down_proj"].reconstructed


@reader
@pytest.mark.parametrize("target", [{"params": "80%"}, {"size": "80%"}])
def test_a_target_is_met_from_below(deep: Path, text_file: Path, tmp_path: Path, target: dict[str, Any]) -> None:
    plan = run.make_plan(wanted(deep, tmp_path / "out", text_file, **target, rows=4))
    assert plan.cut is not None and plan.cut.candidates > 1
    report = made(deep, tmp_path / "out", text_file, **target, rows=4)
    (stage,) = report.stages
    assert stage.cut is not None
    costs = [candidate.cost for candidate in stage.cut.candidates]
    assert None not in costs and costs == sorted(costs, key=lambda cost: cost or 0.0)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    before = sum(path.stat().st_size for path in deep.glob("*.safetensors"))
    numbers = sum(p.numel() for p in load(tmp_path / "out")[0].parameters())
    whole = sum(p.numel() for p in load(deep)[0].parameters())
    assert (numbers <= 0.8 * whole) if "params" in target else (size <= 0.8 * before)
    assert numbers > 0.7 * whole


@pytest.mark.slow
@reader
def test_a_search_is_no_worse_than_any_criterion(text_file: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deeper"
    model = build_model(deep, config("llama", num_hidden_layers=7))
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, (1.0, 0.3, 0.8, 0.1, 0.9, 0.2, 0.6), strict=True):
            layer.self_attn.o_proj.weight *= factor
            layer.mlp.down_proj.weight *= factor
    model.save_pretrained(deep)
    (stage,) = made(deep, tmp_path / "out", text_file, layers=4, rows=4).stages
    assert stage.cut is not None and len(stage.cut.candidates) > 1
    found = {tuple(candidate.layers): candidate.cost for candidate in stage.cut.candidates}
    best = stage.cut.candidates[0].cost
    for criterion in ("divergence", "influence", "angular"):
        (one,) = made(deep, tmp_path / criterion, text_file, layers=4, rows=4, layer_criterion=criterion).stages
        assert one.cut is not None
        cost = found[tuple(one.cut.candidates[0].layers)]
        assert (best is None and cost is None) or (best is not None and cost is not None and best <= cost)


@reader
@pytest.mark.parametrize("criterion", ["obs", "wanda", "activation", "fluctuation", "taylor", "magnitude"])
def test_each_criterion_keeps_others(deep: Path, text_file: Path, tmp_path: Path, criterion: str) -> None:
    made(deep, tmp_path / "out", text_file, neurons=64, criterion=criterion, repair=False)
    whole = load(deep)[0].model.layers[1].mlp
    left = load(tmp_path / "out")[0].model.layers[1].mlp.gate_proj.weight
    index = [next(i for i, row in enumerate(whole.gate_proj.weight) if torch.equal(row, own)) for own in left]
    assert index == sorted(set(index))
    if criterion == "magnitude":
        parts = (whole.gate_proj.weight, whole.up_proj.weight, whole.down_proj.weight.T)
        worth = sum(part.double().square().sum(1) for part in parts)
        assert index == worth.topk(64).indices.sort().values.tolist()


@reader
@pytest.mark.parametrize("cut", [{"neurons": 96, "layers": 3}, pytest.param({"hidden": 48}, marks=pytest.mark.slow)])
def test_a_stopped_run_gives_the_same_bytes(deep: Path, text_file: Path, tmp_path: Path, cut: dict[str, Any]) -> None:
    made(deep, tmp_path / "whole", text_file, **cut)
    with pytest.raises(InterruptedRun):
        run.execute(wanted(deep, tmp_path / "out", text_file, **cut), progress=Stopping(note="block 1: relative"))
    report = made(deep, tmp_path / "out", text_file, **cut)
    assert report.stages[0].resumed_blocks == 2
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@reader
def test_biases_are_fitted_too_and_survive_a_stop(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = models_folder("gpt2")
    made(model, tmp_path / "whole", text_file, neurons=128)
    before, after = (load(path)[0].transformer.h[0].mlp.c_proj.bias for path in (model, tmp_path / "whole"))
    assert not torch.equal(before, after)
    with pytest.raises(InterruptedRun):
        run.execute(
            wanted(model, tmp_path / "out", text_file, neurons=128), progress=Stopping(note="block 0: relative")
        )
    made(model, tmp_path / "out", text_file, neurons=128)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_is_cut_is_quantized_afterwards(deep: Path, text_file: Path, tmp_path: Path) -> None:
    made(deep, tmp_path / "cut", text_file, neurons=64, layers=3)
    arguments = ["quantize", str(tmp_path / "cut"), "--bits", "4", "--group-size", "32", "-o", str(tmp_path / "out")]
    text = ["--calibration", str(text_file), "--samples", "8", "--length", "32", "--evaluation", str(text_file)]
    assert main([*arguments, *text, "--quiet", "--set", "evaluation.speed=false"]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 64


@reader
def test_refused_before_any_compute(
    deep: Path, models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    def refused(model: Path, words: str, hint: str = "", **cut: Any) -> None:
        with pytest.raises(PlanError, match=words) as caught:
            run.make_plan(wanted(model, tmp_path / "out", text_file, **cut))
        assert hint in (caught.value.hint or "")

    refused(deep, "3 heads cannot be kept of 4. 2 of them share", "Possible: 2, 4", heads=3)
    refused(deep, "200 neurons cannot be kept of 128", "1 to 128", neurons=200)
    refused(deep, "9 layers cannot be kept of 4", layers=9)
    refused(deep, "no layer 4: the model has layers 0 to 3", layers=[0, 4])
    refused(deep, "nothing would be cut", layers=4)
    refused(deep, "cannot be met; with a quarter", "Quantize", params="5%")
    refused(models_folder("gpt2"), "heads cannot be cut", "--neurons and --layers can be", heads="50%")
    refused(models_folder("bloom"), "neurons cannot be cut", "--layers can be", neurons="50%")
    refused(models_folder("qwen3-moe"), "hidden cannot be cut", "--experts and --layers can be", hidden=48)
    refused(models_folder("mixtral"), "1 experts cannot be kept of 4", "2, 3, 4", experts=1)
    refused(models_folder("gemma2"), "scalar_embed_scale of .* would be", "follows from the width", hidden=48)
    refused(models_folder("bert"), "no next token", "obs", neurons="50%", criterion="taylor")
    refused(models_folder("modernbert"), "layers are not alike", "Keep that layer", layers=[1])
    with pytest.raises(RecipeError, match="say what is kept"):
        wanted(deep, tmp_path / "out", text_file)


@reader
def test_what_follows_from_a_layers_number_is_not_lost(text_file: Path, tmp_path: Path) -> None:
    build_model(tmp_path / "gpt2", config("gpt2", num_hidden_layers=3, scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(PlanError, match=r"scaling of transformer.h.2.attn would be"):
        run.make_plan(wanted(tmp_path / "gpt2", tmp_path / "out", text_file, layers=[0, 2]))
    made(tmp_path / "gpt2", tmp_path / "out", text_file, layers=[0, 1])  # these keep their numbers


@reader
def test_constants_that_no_module_has_are_not_lost(tmp_path: Path, text_file: Path) -> None:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    settings = {key: value for key, value in {**LIKE_LLAMA, **sizes}.items() if key != "head_dim"}
    build_model(tmp_path / "cpm", MiniCPM3Config(**settings, dim_model_base=32))
    with pytest.raises(PlanError, match="logits_scaling of the configuration"):
        run.make_plan(wanted(tmp_path / "cpm", tmp_path / "out", text_file, hidden=48))


@reader
@pytest.mark.parametrize("cut", [{"neurons": "50%"}, {"layers": [0, 1, 2], "neurons": 96}])
def test_magnitudes_of_models_with_biases(
    models_folder: Callable[..., Path], tmp_path: Path, cut: dict[str, Any]
) -> None:
    build_model(tmp_path / "qwen2", config("qwen2", num_hidden_layers=4))
    for model in (tmp_path / "qwen2", models_folder("gpt2")) if "layers" not in cut else (tmp_path / "qwen2",):
        out = tmp_path / f"out-{model.name}"
        report = made(model, out, tmp_path / "missing.txt", **cut, criterion="magnitude", repair=False)
        assert report.stages[0].cut is not None and report.stages[0].cut.criteria == {"neurons": "magnitude"}


@reader
def test_experts_beside_dense_layers(text_file: Path, tmp_path: Path) -> None:
    build_model(tmp_path / "moe", config("qwen3-moe", num_hidden_layers=4, num_experts=8, mlp_only_layers=[1]))
    (stage,) = made(tmp_path / "moe", tmp_path / "out", text_file, params="85%", layers=4, rows=4).stages
    assert stage.cut is not None and stage.cut.candidates[0].kept["experts"] < 8
    assert stage.cut.criteria["experts"] == "reap"
    report = made(tmp_path / "moe", tmp_path / "few", text_file, experts=6, layers=[1, 2, 3], criterion="taylor")
    assert not {"left_dense"} & {event.kind for event in report.events}
    assert "partly_cut" in {event.kind for event in report.events}


@reader
def test_routers_with_biases_and_experts_without_tokens(text_file: Path, tmp_path: Path) -> None:
    moe = {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    settings = {**LIKE_LLAMA, **moe, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 16}
    build_model(tmp_path / "glm", Glm4MoeConfig(**settings))
    data = wanted(tmp_path / "glm", tmp_path / "out", text_file, experts=6).model_dump(mode="json")
    data["calibration"] |= {"samples": 1, "length": 2}
    report = run.execute(validate(data), progress=Silent())
    assert "unseen_experts" in {event.kind for event in report.events}
    model = load(tmp_path / "out")[0]
    assert model.config.n_routed_experts == 6
    made(tmp_path / "glm", tmp_path / "other", text_file, experts=6, criterion="magnitude")


@reader
def test_a_target_is_met_by_experts(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    (stage,) = made(models_folder("mixtral"), tmp_path / "out", text_file, params="80%", rows=4).stages
    assert stage.cut is not None and stage.cut.candidates[0].cost is not None
    assert any(candidate.kept["experts"] < 4 for candidate in stage.cut.candidates)
    assert stage.cut.candidates[0].parameters <= 0.8 * sum(
        p.numel() for p in load(models_folder("mixtral"))[0].parameters()
    )


@reader
@pytest.mark.parametrize("cut", [{"layers": [0, 2, 3]}, {"neurons": 64, "heads": 2, "criterion": "magnitude"}])
def test_weights_alone_need_no_text(deep: Path, text_file: Path, tmp_path: Path, cut: dict[str, Any]) -> None:
    made(deep, tmp_path / "right", text_file, **cut, repair=False)
    for path in deep.glob("token*"):
        path.unlink()
    report = made(deep, tmp_path / "out", tmp_path / "missing.txt", **cut, repair=False)
    assert report.calibration is None
    assert sorted(content(tmp_path / "out").items()) == sorted(
        (name, data) for name, data in content(tmp_path / "right").items() if not name.startswith("token")
    )
    with pytest.raises(LlmshrinkError):
        made(deep, tmp_path / "other", tmp_path / "missing.txt", **cut)  # what is fitted needs some


def test_a_quantized_model_is_not_cut(deep: Path, text_file: Path, tmp_path: Path) -> None:
    quantize = ["quantize", str(deep), "--method", "rtn", "--group-size", "32", "-o", str(tmp_path / "w4"), "--quiet"]
    assert main([*quantize, "--set", "evaluation.data=[]", "--set", "evaluation.speed=false"]) == 0
    with pytest.raises(PlanError, match="tensors of codes cannot be cut") as caught:
        run.make_plan(wanted(tmp_path / "w4", tmp_path / "out", text_file, neurons=64))
    assert "export --to dense" in (caught.value.hint or "")


@reader
def test_the_flags(deep: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prune", str(deep), "--layers", "0,2,3", "--neurons", "75%", "-o", str(tmp_path / "out"), "--quiet"]
    text = ["--calibration", str(text_file), "--samples", "8", "--length", "32"]
    assert main([*arguments, *text, "--set", "evaluation.data=[]", "--set", "evaluation.speed=false"]) == 0
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert settings["num_hidden_layers"] == 3 and settings["intermediate_size"] == 96
    assert main(["prune", str(deep), "--target-params", "80%", "--plan"]) == 0
    assert "the best of" in capsys.readouterr().out
    assert main(["prune", str(deep), "--neurons", "75%", "--method", "wanda", "--plan"]) == 3
    assert "whole parts" in capsys.readouterr().err
    assert main(["prune", str(deep), "--neurons", "many", "--plan"]) == 3


def test_smoke_is_for_methods(deep: Path) -> None:
    with pytest.raises(UsageError, match="--plan"):
        run.smoke(wanted(deep, deep / "out", deep, neurons=64), progress=Silent())


@reader
def test_what_limits_a_cut_is_told(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    def kinds(family: str, **cut: Any) -> set[str]:
        events = made(models_folder(family), tmp_path / f"{family}{len(cut)}", text_file, **cut).events
        return {event.kind for event in events}

    assert "partly_cut" in kinds("qwen3-moe", neurons=64)
    assert "repair_limited" in kinds("gemma2", neurons=96)
    assert not kinds("llama", neurons=96) & {"partly_cut", "repair_limited", "not_held_back"}
