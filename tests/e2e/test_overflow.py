"""Activations that float16 does not hold: refused where the checkpoint is in float16, told where they come near."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import recipe
from safetensors.torch import load_file, save_file

from llmshrink import run
from llmshrink.errors import InputError
from llmshrink.progress import Silent
from llmshrink.report.schema import Report

pytestmark = pytest.mark.usefixtures("without_reader")
Run = Callable[[torch.dtype, float], Report]
LARGE, HALF_AS_LARGE = 7e4, 3.5e4


@pytest.fixture
def scaled(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> Run:
    """Quantize a model whose second block adds a constant to its outputs: they go up to `size`."""

    def execute(dtype: torch.dtype, size: float) -> Report:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in models_folder("llama", dtype).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "mlp_bias": True}))
        tensors = load_file(folder / "model.safetensors")
        for block in range(2):
            for name, width in (("gate", 128), ("up", 128), ("down", 64)):
                tensors[f"model.layers.{block}.mlp.{name}_proj.bias"] = torch.zeros(width, dtype=dtype)
        # float16 does not hold the constant itself: two blocks add half of it each
        for block in range(2):
            tensors[f"model.layers.{block}.mlp.down_proj.bias"][7] = size / 2
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        wanted = recipe(folder, tmp_path / "out", text_file, {"name": "rtn", "group_size": 32})
        return run.execute(wanted, progress=Silent())

    return execute


def test_what_float16_does_not_hold_is_refused_with_its_block(scaled: Run, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"block 1 gives activations up to 7\d{4}, and float16 ends at 65504"
    ) as caught:
        scaled(torch.float16, LARGE)
    assert caught.value.exit_code == 8 and "bfloat16" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_comes_near_is_told(scaled: Run) -> None:
    told = [event for event in scaled(torch.float16, HALF_AS_LARGE).events if event.kind == "near_fp16_limit"]
    assert [event.data["block"] for event in told if event.data] == [0, 1]
    assert all(
        event.data and abs(event.data["largest"] / size - 1) < 0.05
        for event, size in zip(told, [17500, 35000], strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_hold_it(scaled: Run, dtype: torch.dtype) -> None:
    assert not [event for event in scaled(dtype, LARGE).events if event.kind == "near_fp16_limit"]
