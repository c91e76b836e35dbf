"""What transformers would not load is known before any compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import recipe
from tiny import LIKE_LLAMA, build_model

from llmshrink import run
from llmshrink.errors import PlanError
from llmshrink.formats.compressed_tensors import CompressedTensors
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.rehearse import rehearse
from llmshrink.plan.resolve import resolve
from llmshrink.plan.work import Work
from llmshrink.progress import Silent
from llmshrink.recipe.stages import QuantizeStage

RTN = {"name": "rtn", "bits": 4, "group_size": 32}


def work_of(folder: Path, text: Path, fmt: str) -> Work:
    wanted = recipe(folder, folder / "out", text, RTN, stage={"format": {"name": fmt}})
    stage = wanted.stages[0]
    assert isinstance(stage, QuantizeStage)
    return resolve(wanted, stage, StreamedModel(open_source(str(folder)), torch.device("cpu")))


@pytest.mark.parametrize("fmt", ["compressed-tensors", "dense"])
def test_the_usual_way_is_left_as_it_is(
    models_folder: Callable[..., Path], text_file: Path, capfd: pytest.CaptureFixture[str], fmt: str
) -> None:
    work = work_of(models_folder("mixtral"), text_file, fmt)
    assert "dequantize" not in (work.quantization_config or {})
    assert not [event for event in work.events if event.kind == "loaded_dense"]
    assert capfd.readouterr() == ("", ""), "the loader's bars and warnings are about tensors without data"


def test_a_name_that_the_loader_does_not_know_is_refused(
    models_folder: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = CompressedTensors.pack

    def misnamed(*arguments: Any) -> dict[str, torch.Tensor]:
        return {name.replace("weight_scale", "weight_scales"): t for name, t in pack(*arguments).items()}

    monkeypatch.setattr(CompressedTensors, "pack", misnamed)
    with pytest.raises(PlanError, match="would not load .* as compressed-tensors: .*weight_scale"):
        work_of(models_folder("llama"), text_file, "compressed-tensors")


def test_settings_that_leave_a_layer_dense_are_refused(
    models_folder: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(models_folder("llama"), text_file, "compressed-tensors")
    assert work.quantization_config is not None
    monkeypatch.setattr(CompressedTensors, "other_config", lambda *_: None)  # it packs and unpacks regardless
    work.quantization_config["ignore"].append("model.layers.1.mlp.down_proj")
    with pytest.raises(PlanError, match="layers.1.mlp.down_proj"):
        rehearse(work)


@pytest.mark.parametrize("layers", [{}, {".*c_proj|.*fc2": {"bits": 8}}])
def test_where_only_decompressing_works_it_is_asked_for(
    text_file: Path, tmp_path: Path, layers: dict[str, Any]
) -> None:
    config = transformers.NanoChatConfig(**{**LIKE_LLAMA, "head_dim": 16})  # it looks at each linear's weight
    build_model(tmp_path / "model", config)
    wanted = recipe(tmp_path / "model", tmp_path / "out", text_file, RTN, stage={"layers": layers})
    if layers:  # one scheme for all layers is all that this way knows
        with pytest.raises(PlanError, match="AttributeError: .* no attribute 'weight'"):
            run.make_plan(wanted)
        return
    report = run.execute(wanted, progress=Silent())
    assert [event.kind for event in report.events] == ["loaded_dense"]
    assert {check.name: check.passed for check in report.stages[0].checks}["reader"]
    run.check_gates(report)
