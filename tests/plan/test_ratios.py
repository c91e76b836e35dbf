"""What gets a share of its own, the recipe that then says it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import recipe

from llmshrink import run
from llmshrink.errors import PlanError, RecipeError
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.ratios import Ratios
from llmshrink.recipe.load import dump, validate
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import PruneStage
from llmshrink.recipe.text import parse

OWL, GLOBAL = {"name": "owl"}, {"name": "global"}


def wanted(model: Path, text: Path, method: str = "magnitude", ratios: Any = None, **stage: Any) -> Recipe:
    settings = {"name": method, "sparsity": 0.6, **stage.pop("settings", {})}
    return recipe(model, model.parent / "out", text, settings, stage={"ratios": ratios or OWL, **stage})


def ratios_of(wanted: Recipe) -> Ratios:
    (stage,) = wanted.stages
    assert isinstance(stage, PruneStage)
    return Ratios(wanted, stage, StreamedModel(open_source(str(wanted.model.id)), torch.device("cpu")))


def test_units_are_blocks_or_matrices(smallest: Path, text_file: Path) -> None:
    layers = {r".*0\.mlp\.down_proj": {"sparsity": 0.1}}
    blocks = ratios_of(wanted(smallest, text_file, layers=layers, ignore=[".*1.*q_proj"])).units
    assert [len(unit.matrices) for unit in blocks] == [6, 6]
    each = ratios_of(wanted(smallest, text_file, ratios=GLOBAL, layers=layers)).units
    assert [len(unit.matrices) for unit in each] == [1] * 13


def test_the_recipe_says_what_was_found(smallest: Path, text_file: Path) -> None:
    layers = {r".*0\.mlp\.down_proj": {"sparsity": 0.1}}
    ratios = ratios_of(wanted(smallest, text_file, "wanda", layers=layers))
    said = validate(parse(dump(ratios.recipe([0.5, 0.7])), "recipe"))  # as it is written
    (stage,) = said.stages
    assert isinstance(stage, PruneStage) and stage.ratios is None

    def share(name: str) -> Any:
        spec = stage.method_for(name, stage.method)
        return spec and spec.settings["sparsity"]

    assert share("model.layers.0.mlp.up_proj") == share("model.layers.0.self_attn.q_proj") == 0.5
    assert share("model.layers.1.mlp.down_proj") == 0.7
    assert share("model.layers.0.mlp.down_proj") == 0.1


def test_the_plan_has_the_bytes_of_equal_shares(smallest: Path, text_file: Path) -> None:
    for method, ratios in (("wanda", OWL), ("magnitude", GLOBAL)):
        found = run.make_plan(wanted(smallest, text_file, method, ratios))
        equal = run.make_plan(wanted(smallest, text_file, method).model_copy(update={"stages": [
            PruneStage.model_validate({"task": "prune", "method": {"name": method, "sparsity": 0.6}})
        ]}))  # fmt: skip
        assert found.bytes_after == equal.bytes_after and found.memory_bytes >= equal.memory_bytes
        assert found.ratios is not None and equal.ratios is None
        assert (found.ratios.name, found.ratios.sparsity) == (ratios["name"], 0.6)
        assert all(layer.open for layer in found.layers) and not any(layer.open for layer in equal.layers)


def test_the_folder_names_what_was_asked(smallest: Path, text_file: Path) -> None:
    asked = wanted(smallest, text_file, "sparsegpt").model_copy(update={"output": None})
    assert run.make_plan(asked).output == "out/model-sparsegpt-60-owl"


def test_what_cannot_be_is_refused(smallest: Path, text_file: Path) -> None:
    def problems(*args: Any, **stage: Any) -> str:
        with pytest.raises(RecipeError) as found:
            wanted(smallest, text_file, *args, **stage)
        return str(found.value.problems)

    assert "drops the same share everywhere" in problems(settings={"sparsity": None, "pattern": "2:4"})
    assert "leave out one or the other" in problems(allocate={"bpw": 8})
    for method in ("wanda", "sparsegpt", "random"):
        assert "for method magnitude" in problems(method, GLOBAL)
    assert "did you mean" in problems(ratios={"name": "owl", "thresh": 3})
    with pytest.raises(PlanError, match="nothing to find"):
        run.make_plan(wanted(smallest, text_file, layers={".*": {"sparsity": 0.2}}))
    with pytest.raises(PlanError, match="at least 1% of each layer"):
        run.make_plan(wanted(smallest, text_file, settings={"sparsity": 0.995}))
