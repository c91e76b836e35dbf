"""What candidates cost, against the whole model with one unit's matrices replaced in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load, recipe
from tiny import build_model, config
from torch import Tensor
from transformers import PreTrainedModel

from llmshrink.calibration.rows import Rows
from llmshrink.forms import decode
from llmshrink.methods.gptq import Gptq
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.task import task_of
from llmshrink.plan.choices import Choices, Unit
from llmshrink.plan.economy import Economy
from llmshrink.progress import Silent
from llmshrink.recipe.stages import QuantizeStage
from llmshrink.sensitivity.kept import Kept
from llmshrink.sensitivity.measure import Sensitivity
from llmshrink.statistics import Hessian

TWO = [{"bits": 2, "group_size": 32}, {"bits": 4, "group_size": 32}]
TYPES = [{"type": "Q4_0"}, {"type": "Q8_0"}]


def prepared(folder: Path, text: Path, **stage: Any) -> tuple[Choices, Rows]:
    """Choices of a model, and random rows to calibrate on."""
    method = {"name": stage.pop("name", "rtn")}
    allocate = {"rows": 3, "length": 24, "candidates": TWO, **stage.pop("allocate", {})}
    made = recipe(folder, folder / "out", text, method, stage={"allocate": allocate, **stage})
    (first,) = made.stages
    assert isinstance(first, QuantizeStage)
    choices = Choices(made, first, StreamedModel(open_source(str(folder)), torch.device("cpu")))
    tokens = torch.randint(3, 150, (6, 32), generator=torch.Generator().manual_seed(5))
    return choices, Rows(tuple(tokens), "random", "random")


def measured(choices: Choices, rows: Rows, folder: Path, economy: Economy | None = None) -> list[list[float]]:
    economy, kept = economy or Economy(64), Kept(folder, {}, spare=folder)
    return Sensitivity(choices, rows, economy=economy, folder=folder, kept=kept, progress=Silent()).measure()


def replaced(folder: Path, choices: Choices, unit: Unit, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The model as transformers has it, with other weights [out, in] for the matrices of a unit, by their keys."""
    streamed, model = choices.model, load(folder)[0]
    conv1d = {m.key for m in unit.matrices if m.transposed}
    seen = {key: weight.T if key in conv1d else weight for key, weight in weights.items()}

    def get(key: str) -> Tensor:
        return seen[key] if key in seen else streamed.weights.get(key).float()

    state = {name: streamed.map.build(name, get) for name in streamed.map.origins}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def output(model: PreTrainedModel, rows: Rows) -> Tensor:
    few = torch.stack([row[:24] for row in rows.tokens[:3]])
    with torch.no_grad():
        return task_of(model.config).output(model(few)).double()


def cost(folder: Path, choices: Choices, rows: Rows, unit: Unit, weights: dict[str, Tensor]) -> float:
    """By brute force."""
    found, right = output(replaced(folder, choices, unit, weights), rows), output(load(folder)[0], rows)
    if not choices.model.distribution:
        return float((found - right).square().sum() / right.square().sum())
    if choices.model.task.causal:
        found, right = found[:, :-1], right[:, :-1]
    a, b = right.log_softmax(-1), found.log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def rounded(choices: Choices, unit: Unit, option: int) -> dict[str, Tensor]:
    """The weights of a unit that a method makes from the weights alone."""
    work = choices.works[option]
    found = {}
    for matrix in unit.matrices:
        method, weight = work.methods[matrix], choices.model.read(matrix)
        found[matrix.key] = decode(
            method.compress(weight, method.prepare(method.needs(weight.shape[1], weight.device))).weight
        )
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe", "bert", "bert-classes"])
def test_it_is_what_the_whole_model_suffers(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    folder = models_folder(family)
    choices, rows = prepared(folder, text_file, format={"name": "dense"})
    costs = measured(choices, rows, tmp_path)
    for unit, found in zip(choices.units, costs, strict=True):
        expected = [cost(folder, choices, rows, unit, rounded(choices, unit, option)) for option in unit.options]
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-6), unit.name
        assert found[0] > found[1]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_embedding_and_head_too(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    folder = models_folder(family)
    if family == "gemma2":  # its head is the embedding, its embedding is scaled, its logits are capped
        folder = tmp_path / "model"
        build_model(folder, config("gemma2", query_pre_attn_scalar=16))
    choices, rows = prepared(folder, text_file, format={"name": "gguf"}, allocate={"candidates": TYPES})
    costs = dict(zip((unit.name for unit in choices.units), measured(choices, rows, tmp_path), strict=True))
    ends = [unit for unit in choices.units if unit.matrices[0].kind in ("embedding", "head")]
    assert len(ends) == 1 + (family == "llama")
    for unit in ends:
        expected = [cost(folder, choices, rows, unit, rounded(choices, unit, option)) for option in unit.options]
        assert costs[unit.name] == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_gptq_is_calibrated_on_what_the_original_gives(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """On all rows, though it is measured on a few."""
    folder = models_folder("llama")
    choices, rows = prepared(folder, text_file, name="gptq")
    unit = next(unit for unit in choices.units if unit.name.endswith("layers.1.mlp.down_proj"))
    model, hessian = load(folder)[0], Hessian(128, torch.device("cpu"))
    seen: list[Tensor] = []
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(torch.stack(rows.tokens))
    hessian.update(seen[0].reshape(-1, 128))
    hessian.finish()
    (matrix,) = unit.matrices
    expected = []
    for option in unit.options:
        method = choices.works[option].methods[matrix]
        assert isinstance(method, Gptq)
        layer = method.compress(choices.model.read(matrix), method.prepare(hessian))
        expected.append(cost(folder, choices, rows, unit, {matrix.key: decode(layer.weight)}))
    found = measured(choices, rows, tmp_path)[choices.units.index(unit)]
    assert found == pytest.approx(expected, rel=0.02)


def test_the_error_of_blocks(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    folder = models_folder("llama")
    choices, rows = prepared(folder, text_file, allocate={"score": "block"})
    costs = measured(choices, rows, tmp_path)
    few = torch.stack([row[:24] for row in rows.tokens[:3]])

    def ends(model: PreTrainedModel, block: int) -> Tensor:
        seen: list[Tensor] = []
        model.get_submodule(f"model.layers.{block}").register_forward_hook(lambda *a: seen.append(a[2]))
        with torch.no_grad():
            model(few)
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    for unit, found in zip(choices.units, costs, strict=True):
        block = int(unit.name.split(".")[2])
        right = ends(load(folder)[0], block)
        wrong = ends(replaced(folder, choices, unit, rounded(choices, unit, 0)), block)
        assert found[0] == pytest.approx(float((wrong - right).square().sum() / right.square().sum()), rel=1e-3)


def test_thrift_changes_nothing(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    choices, rows = prepared(models_folder("llama"), text_file, name="gptq")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    thrifty = Economy(64, on_disk=True, statistics=1)
    assert measured(choices, rows, tmp_path / "a") == measured(choices, rows, tmp_path / "b", thrifty)


def test_what_was_measured_is_not_measured_again(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices, rows = prepared(models_folder("llama"), text_file)
    costs, done = measured(choices, rows, tmp_path), []
    whole = Sensitivity._made

    def made(self: Sensitivity, block: Any, units: Any) -> Any:
        done.append(block.index)
        return whole(self, block, units)

    monkeypatch.setattr(Sensitivity, "_made", made)
    assert measured(choices, rows, tmp_path) == costs and not done
    first, second = sorted(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:-9])  # torn
    assert measured(choices, rows, tmp_path) == costs and done == [0]
    second.unlink()
    assert measured(choices, rows, tmp_path) == costs and done == [0, 1]
