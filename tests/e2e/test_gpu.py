"""The same commands on a GPU, within tolerance of the CPU's result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import recipe

from llmshrink import run
from llmshrink.progress import Silent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("method", [{"name": "gptq", "group_size": 32}, {"name": "rtn", "group_size": 32}])
def test_a_gpu_gives_the_cpu_s_result(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, method: dict[str, object]
) -> None:
    errors = []
    for device in ("cpu", "cuda"):
        made = recipe(models_folder("llama"), tmp_path / device, text_file, dict(method), run={"device": device})
        report = run.execute(made, progress=Silent())
        assert report.device.startswith(device)
        errors.append([layer.relative_error for layer in report.stages[0].layers])
    assert torch.allclose(torch.tensor(errors[0]), torch.tensor(errors[1]), rtol=0.02)
