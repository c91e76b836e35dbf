"""A foreign reader: one process of another environment that reads many folders."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

PYTHON = "LLMSHRINK_READERS_PYTHON"
SCRIPT = Path(__file__).parent / "read.py"


@dataclass(frozen=True)
class Reading:
    """What plain transformers made of a folder; see read.py."""

    error: str | None  # the traceback of what stopped it
    misplaced: tuple[str, ...]  # missing, unexpected and mismatched keys
    weights: dict[str, Tensor]  # of each quantized module: [out, in] in the reader's dtype
    logits: Tensor | None  # float32 [rows, T, V]


def read_folders(work: Path, folders: list[Path], tokens: Tensor, dtype: str) -> list[Reading]:
    """What the readers' environment finds in each folder; `work` is an empty folder, tokens [rows, T]."""
    python = os.environ.get(PYTHON)
    if python is None:
        pytest.fail(f"{PYTHON} does not name the Python of the readers' environment; `make test-readers` sets it")
    asked = [{"folder": str(folder), "tokens": tokens.tolist(), "dtype": dtype} for folder in folders]
    (work / "requests.json").write_text(json.dumps(asked))
    # Compiling each kind of kernel would take minutes and change no number that is looked at here.
    more = {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, SCRIPT, work],
        env=os.environ | more,
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return [_reading(work, number) for number in range(len(folders))]


def _reading(work: Path, number: int) -> Reading:
    found = json.loads((work / f"{number}.json").read_text())
    tensors = load_file(work / f"{number}.safetensors")
    logits = tensors.pop("logits", None)
    return Reading(found["error"], tuple(found["misplaced"]), tensors, logits)


def kl_and_agreement(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """KL(ours || theirs) in nats per token, and the share of positions with the same first choice."""
    p, q = torch.log_softmax(ours.double(), -1), torch.log_softmax(theirs.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
