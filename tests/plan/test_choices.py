"""What can be chosen for layers, and that a size is met or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import recipe
from tiny import build_model, config

from llmshrink import run
from llmshrink.cli.options import build_recipe
from llmshrink.errors import PlanError, RecipeError
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.choices import Choices
from llmshrink.plan.loading import stored
from llmshrink.plan.resolve import resolve
from llmshrink.recipe.load import dump, validate
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import QuantizeStage

TYPED = [{"bits": 2, "group_size": 16}, {"bits": 3, "group_size": 32}, {"bits": 8, "group_size": 32}]
RTN = {"name": "rtn"}


def wanted(model: Path, out: Path, text: Path, method: dict[str, Any] | None = None, **allocate: Any) -> Recipe:
    stage = {"allocate": {"candidates": TYPED, **allocate.pop("allocate", allocate)}, **allocate.pop("stage", {})}
    return recipe(model, out, text, method or RTN, stage=stage)


def choices_of(wanted: Recipe) -> Choices:
    (stage,) = wanted.stages
    assert isinstance(stage, QuantizeStage) and wanted.model.id is not None
    return Choices(wanted, stage, StreamedModel(open_source(wanted.model.id), torch.device("cpu")))


def test_what_a_runtime_holds_as_one_is_alike(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    alike = [{**keys, "group_size": 32} for keys in TYPED]  # transformers reads one group size beside experts
    found = choices_of(wanted(models_folder("qwen3-moe"), tmp_path / "out", text_file, bpw=8, candidates=alike))
    names = [unit.name for unit in found.units]
    assert names == [
        "model.layers.0.self_attn.q_proj, k_proj, v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.experts.*.gate_proj, up_proj, down_proj",
        "model.layers.1.self_attn.q_proj, k_proj, v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj, up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    experts = found.units[2]
    assert len(experts.matrices) == 12 and len(experts.patterns) == 3
    mixed = found.work([i % 3 for i in range(len(found.units))])
    assert stored(mixed).fused_alike


@pytest.mark.parametrize("asked", [{"size": 70_000}, {"size": "55%"}, {"bpw": 19.0}, {"bpw": 20.5}])
def test_a_size_is_met_from_below_by_real_bytes(
    smallest: Path, text_file: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    found = choices_of(wanted(smallest, tmp_path / "out", text_file, **asked))
    found.check()
    scores = [[1.0 / size for size in sizes] for sizes in found.sizes]
    work = found.work(found.assign(scores))
    asked_bytes = int(asked["bpw"] * found.model.parameters / 8) if "bpw" in asked else found.limit
    assert found.size(work) <= found.limit == asked_bytes
    real = work.file_bytes if "size" in asked else work.tensor_bytes
    assert found.size(work) == sum(real.values())


def test_the_recipe_of_a_choice_is_resolved_to_the_same_work(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    found = choices_of(wanted(smallest, tmp_path / "out", text_file, bpw=20))
    assignment = [i % 3 for i in range(len(found.units))]
    made = validate(__import__("yaml").safe_load(dump(found.recipe(assignment))))
    (stage,) = made.stages
    assert isinstance(stage, QuantizeStage) and stage.allocate is None
    again, work = resolve(made, stage, found.model), found.work(assignment)
    assert again.file_bytes == work.file_bytes
    assert {m.name: x.config for m, x in again.methods.items()} == {m.name: x.config for m, x in work.methods.items()}


def test_layers_that_the_recipe_names_stay_as_it_says(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"layers": {".*o_proj": {"bits": 4, "group_size": 16}}, "ignore": [".*k_proj"]}
    found = choices_of(wanted(smallest, tmp_path / "out", text_file, allocate={"bpw": 20}, stage=stage))
    names = [unit.name for unit in found.units]
    assert "model.layers.0.self_attn.q_proj, v_proj" in names and not any("o_proj" in name for name in names)
    for work in found.works:
        bits = {m.name: method.config.bits for m, method in work.methods.items()}
        assert bits["model.layers.0.self_attn.o_proj"] == 4
        assert "model.layers.0.self_attn.k_proj" not in bits


def test_usual_candidates_are_those_that_fit(
    models_folder: Callable[..., Path], smallest: Path, text_file: Path, tmp_path: Path
) -> None:
    found = choices_of(recipe(smallest, tmp_path / "out", text_file, RTN, stage={"allocate": {"bpw": 20}}))
    assert found.candidates[0] == {"bits": 2, "group_size": 32}
    sixty_four = found.candidates.index({"bits": 2, "group_size": 64})
    having = [unit.name for unit in found.units if sixty_four in unit.options]
    assert having == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]  # the only ones 64 wide


def test_gguf_mixes_types_with_the_embedding_and_the_head(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    stage = {"format": {"name": "gguf"}, "allocate": {"bpw": 6.5}}
    found = choices_of(recipe(models_folder("llama"), tmp_path / "out", text_file, RTN, stage=stage))
    assert found.candidates == [{"type": "Q8_0"}, {"type": "Q4_0"}, {"type": "Q5_0"}]  # not one is 256 wide
    names = [unit.name for unit in found.units]
    assert names[0] == "model.embed_tokens" and names[-1] == "lm_head" and len(names) == 16
    work = found.work(found.assign([[1.0 / size for size in sizes] for sizes in found.sizes]))
    assert work.mix is None and found.size(work) == sum(work.tensor_bytes.values()) <= found.limit


def test_the_plan_shows_the_bounds_and_what_is_open(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    plan = run.make_plan(wanted(smallest, tmp_path / "out", text_file, bpw=20))
    assert plan.allocation is not None and plan.allocation.candidates == TYPED and plan.allocation.units == 8
    assert plan.allocation.smallest_bytes < plan.bytes_after <= plan.allocation.asked_bytes
    assert all(layer.open and layer.bits is None for layer in plan.layers)
    assert plan.bits_per_weight <= 20


def test_what_cannot_be_met_names_what_can(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"No choice of candidates has .* the smallest has ([\d,]+)") as caught:
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, bpw=2))
    least = float(str(caught.value).rpartition("Ask for ")[2].split()[0])
    plan = run.make_plan(wanted(smallest, tmp_path / "out", text_file, bpw=least))
    assert plan.allocation is not None and plan.bytes_after == plan.allocation.smallest_bytes


@pytest.mark.parametrize(
    ("family", "stage", "why"),
    [
        ("llama", {"allocate": {"candidates": TYPED}}, "must say how large"),
        ("gpt2", {"allocate": {"bpw": 9}}, "Conv1D"),
        ("llama", {"allocate": {"bpw": 9, "candidates": TYPED}, "format": {"name": "gptq"}}, "one scheme"),
        ("falcon", {"allocate": {"bpw": 9, "candidates": TYPED}}, "share one scheme"),
        ("llama", {"allocate": {"bpw": 9}, "layers": {".*": {"bits": 4}}}, "nothing to choose"),
        ("llama", {"allocate": {"bpw": 9, "candidates": [{"bits": 3, "group_size": 48}]}}, "does not divide"),
        ("llama", {"allocate": {"bpw": 9, "candidates": [{"type": "Q4_0"}]}}, "block type of GGUF"),
        (
            "llama",
            {"allocate": {"bpw": 9, "candidates": [{"bits": 8, "group_size": -1}]}, "inputs": "int8"},
            "weights alone",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_compute(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str, stage: dict[str, Any], why: str
) -> None:
    with pytest.raises(PlanError, match=why):
        run.make_plan(recipe(models_folder(family), tmp_path / "out", text_file, RTN, stage=stage))


@pytest.mark.parametrize(
    ("allocate", "why"),
    [
        ({"size": "3GiB", "bpw": 3.0}, r"allocate\.bpw: the size says it already"),
        ({"bpw": 3.0, "candidates": []}, r"allocate\.candidates"),
        (
            {"bpw": 3.0, "candidates": [{"bits": 3}, {"bit": 2}]},
            r"candidates\[1\]\.bit: unknown key; did you mean 'bits'",
        ),
        ({"bpw": 3.0, "candidates": [{"bits": 5}]}, r"candidates\[0\]\.bits"),
        ({"bpw": 0.0}, r"allocate\.bpw"),
        ({"size": "3 spoons"}, r"allocate\.size"),
        ({"bpw": 3.0, "score": "luck"}, r"allocate\.score"),
    ],
)
def test_faults_in_a_recipe(allocate: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        validate({"version": 1, "stages": [{"task": "quantize", "allocate": allocate}]})


def test_a_flag_replaces_the_target_of_a_recipe() -> None:
    (stage,) = build_recipe("quantize", {"recipe": "mixed-3bpw", "target_size": "3GiB"}).stages
    assert isinstance(stage, QuantizeStage) and stage.allocate is not None
    assert stage.allocate.bpw is None and stage.allocate.size is not None
    with pytest.raises(RecipeError, match="the size says it already"):
        build_recipe("quantize", {"target_bpw": 3.0, "target_size": "3GiB"})


def test_the_smallest_size_that_is_named_can_be_had(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    """Headers differ by what the candidates are called, and these are named from the largest."""
    with pytest.raises(PlanError, match="No choice of candidates") as caught:
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, size=1000, candidates=TYPED[::-1]))
    least = int(str(caught.value).partition("the smallest has ")[2].split()[0].replace(",", ""))
    plan = run.make_plan(wanted(smallest, tmp_path / "out", text_file, size=least, candidates=TYPED[::-1]))
    assert sum(plan.file_bytes.values()) == least


def test_a_head_that_gets_a_tensor_of_its_own_is_counted(text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "tied"
    build_model(model, config("llama", tie_word_embeddings=True))
    turn = {"name": "hadamard", "allow_untie": True}
    asked = {"allocate": {"bpw": 30, "candidates": TYPED}}
    tied, untied = (
        choices_of(recipe(model, tmp_path / "out", text_file, RTN, stage={**asked, **more}))
        for more in ({}, {"transform": [turn]})
    )
    head = untied.model.weights.infos["lm_head.weight"]
    assert tied.model.source.config.tie_word_embeddings and untied.smallest - tied.smallest == head.bytes
