"""The order in which a block is calibrated and compressed, against references written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import recipe
from tiny import build_model, config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmshrink import run
from llmshrink.calibration.load import TextLoader
from llmshrink.calibration.rows import Rows
from llmshrink.engine import compress
from llmshrink.engine.budget import planned_memory
from llmshrink.errors import ResourceError
from llmshrink.forms import decode
from llmshrink.methods import load_method
from llmshrink.model import streamed
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.economy import Economy
from llmshrink.plan.resolve import resolve
from llmshrink.progress import Silent
from llmshrink.report.schema import Check
from llmshrink.statistics import Hessian

CPU = torch.device("cpu")
GPTQ = {"name": "gptq", "bits": 3, "group_size": 32}
DENSE = {"format": {"name": "dense"}}
STRETCHES = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
STRETCHES += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


@pytest.fixture(scope="module", autouse=True)
def without_reader() -> Iterator[None]:
    """These tests read the tensors themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
        yield


def calibrate(model: PreTrainedModel, names: list[str], rows: list[Tensor]) -> Hessian:
    """The Hessian of the input that the linears called `names` share, from the whole model."""
    first = model.get_submodule(names[0])
    hessian = Hessian(first.in_features, CPU)  # type: ignore[arg-type]
    handle = first.register_forward_pre_hook(lambda _m, args: hessian.update(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for tokens in rows:
            model(tokens)
    handle.remove()
    hessian.finish()
    return hessian


def reference(folder: Path, rows: Rows, steps: list[list[list[str]]]) -> dict[str, Tensor]:
    """GPTQ on a whole model in memory; each step is calibrated at once, with all before it compressed."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cls = load_method("gptq")
    method = cls(cls.Config(bits=3, group_size=32))
    found = {}
    for step in steps:
        hessians = [calibrate(model, names, rows.batches(192)) for names in step]
        for names, hessian in zip(step, hessians, strict=True):
            prepared = method.prepare(hessian)
            for name in names:
                weight = model.get_submodule(name).weight
                found[f"{name}.weight"] = decode(method.compress(weight.data.clone(), prepared).weight)
                weight.data.copy_(found[f"{name}.weight"])
    return found


@pytest.mark.parametrize("sequential", ["block", "subset"])
def test_layers_see_what_the_recipe_says(
    models_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sequential: str,
) -> None:
    folder, rows = models_folder("llama"), []
    calibration = TextLoader.calibration
    monkeypatch.setattr(TextLoader, "calibration", lambda *args: rows.append(calibration(*args)) or rows[0])
    settings: dict[str, Any] = {"stage": DENSE, "run": {"sequential": sequential, "threads": 1}}
    run.execute(recipe(folder, tmp_path / "out", text_file, GPTQ, **settings), progress=Silent())
    steps = []
    for block in range(2):
        named = [[f"model.layers.{block}.{name}" for name in names] for names in STRETCHES]
        steps += [[names] for names in named] if sequential == "subset" else [named]
    written = StreamedModel(open_source(str(tmp_path / "out")), CPU).weights
    for name, expected in reference(folder, rows[0], steps).items():
        same = (written.get(name) == expected).float().mean()
        assert same > 0.98, name  # a sum in another order may turn a code that lies on the edge
    # The other order gives other codes: the test can tell the two apart.
    other = [[names] for step in steps for names in step] if sequential == "block" else [sum(steps[:4], [])]
    name = "model.layers.0.mlp.down_proj.weight"
    assert (written.get(name) == reference(folder, rows[0], other)[name]).float().mean() < 0.95


def test_a_method_that_needs_no_data_runs_no_calibration(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("calibration was asked for")

    monkeypatch.setattr(TextLoader, "calibration", refuse)
    monkeypatch.setattr(compress, "gather", refuse)
    report = run.execute(
        recipe(models_folder("llama"), tmp_path / "out", text_file, {"name": "rtn"}, stage=DENSE), progress=Silent()
    )
    assert report.calibration is None
    assert all(layer.objective is None for layer in report.stages[0].layers)


@pytest.mark.parametrize("method", [GPTQ, {**GPTQ, "weighting": "gradient"}])
def test_planned_memory_does_not_grow_with_depth(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    build_model(tmp_path / "deep", config("llama", num_hidden_layers=6))
    planned = {}
    for folder in (models_folder("llama"), tmp_path / "deep"):
        wanted = recipe(folder, tmp_path / "out", text_file, method)
        model = StreamedModel(open_source(str(folder)), CPU)
        work = resolve(wanted, wanted.stages[0], model)  # type: ignore[arg-type]
        planned[folder.name] = [planned_memory(work, Economy(192), rows=1 << 14, subset=s) for s in (False, True)]
    if "weighting" in method:  # the states between blocks of a part of the rows: as many numbers as all rows have once
        assert planned["deep"][0] <= planned[models_folder("llama").name][0]
    else:
        assert planned["deep"] == planned[models_folder("llama").name]
    whole, subset = planned["deep"]
    assert subset <= whole


def test_a_whole_block_may_be_left_out(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    ignored = {"stage": {**DENSE, "ignore": [r".*layers\.0\..*"]}}
    report = run.execute(
        recipe(models_folder("llama"), tmp_path / "out", text_file, GPTQ, **ignored), progress=Silent()
    )
    for layer in report.stages[0].layers:
        assert (layer.method is not None) == (".layers.1." in layer.name)
        assert layer.reason == (None if layer.method else "the recipe leaves it out")


def test_a_comparison_that_does_not_fit_is_refused_before_compute(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"data": [str(text_file)], "rows": 10**7, "length": 32}
    wanted = recipe(models_folder("llama"), tmp_path / "out", text_file, GPTQ, evaluation=evaluation)
    with pytest.raises(ResourceError, match=r"MiB of disk") as caught:  # hidden states go there first
        run.execute(wanted, progress=Silent())
    assert caught.value.exit_code == 6 and list(tmp_path.iterdir()) == []
    evaluation["rows"] = 10**5
    batches = {"batch_tokens": 10**9}
    wanted = recipe(models_folder("llama"), tmp_path / "out", text_file, GPTQ, evaluation=evaluation, run=batches)
    with pytest.raises(ResourceError, match=r"compare both models.*\n.*evaluation\.rows") as caught:
        run.execute(wanted, progress=Silent())
    assert caught.value.exit_code == 6 and list(tmp_path.iterdir()) == []


def test_wide_layers_run_fewer_tokens_at_a_time(
    models_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), CPU)
    widest = max(max(m.shape) for block in model.anatomy.blocks for m in block.matrices)
    assert (model.batch_tokens(7), model.batch_tokens(None)) == (7, 1024)
    monkeypatch.setattr(streamed, "ACTIVATIONS", 100 * widest)
    assert model.batch_tokens(None) == 100
