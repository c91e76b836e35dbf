"""Tiny models built once, texts, and an environment without network or tokens."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded; spinning threads starve others

import torch
from hub import Hub, point_here
from huggingface_hub import close_session
from tiny import TEXT, build_model, config
from transformers.utils import logging

from llmshrink.cli import main
from llmshrink.evaluate import reader
from llmshrink.report.schema import Check

os.fsync = lambda _: None  # nothing cuts the power here, and waiting for disks is a tenth of the time
reader.SERVER_IMPORTS.append("bitsandbytes")  # once, not in each of the many readers that these tests start


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON list of sentences."""
    path = tmp_path_factory.mktemp("text") / "sentences.json"
    path.write_text(json.dumps(TEXT))
    return path


@pytest.fixture(scope="session")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other sentences, to evaluate on."""
    path = tmp_path_factory.mktemp("text") / "others.txt"
    path.write_text("\n\n".join(f"A heron saw {n} lamps by the river; the fox counted {n + 1}." for n in range(200)))
    return path


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function family, dtype -> folder of a tiny random model, each built once."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{family}-{dtype}".replace("torch.", "")
        if not path.exists():
            build_model(path, config(family), dtype)
        return path

    return folder


@pytest.fixture(scope="session")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the smallest Llama, quantized in a second; tests spoil only copies of it."""
    folder = tmp_path_factory.mktemp("smallest") / "model"
    build_model(
        folder, config("llama", hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)
    )
    return folder


@pytest.fixture
def model(smallest: Path, tmp_path: Path) -> Path:
    """A copy of the smallest Llama that a test may spoil."""
    return shutil.copytree(smallest, tmp_path / "model")


@pytest.fixture(scope="module")
def without_reader() -> Iterator[None]:
    """Leave out the check that loads the output with plain transformers, whose imports take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
        yield


@pytest.fixture
def refused(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, set[str]]]:
    """Run `llmshrink quantize` on arguments; gives its exit code, what it said, and what it left beside."""

    def call(*arguments: str | Path) -> tuple[int, str, set[str]]:
        before = set(tmp_path.iterdir())
        settings = ["--output", tmp_path / "out", "--calibration", text_file, "--samples", "4", "--length", "16"]
        more = ["--set", "evaluation.data=[]", "--set", "evaluation.speed=false", "--group-size", "32"]
        code = main([str(argument) for argument in ["quantize", *settings, *more, *arguments]])
        return code, capsys.readouterr().err, {p.name for p in set(tmp_path.iterdir()) - before}

    return call


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on loopback that the libraries of this process talk to, with an empty cache in `tmp_path / "home"`."""
    with Hub() as server:
        point_here(monkeypatch, server.url, tmp_path / "home")
        yield server
        close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that anything wanted to sleep; nothing does."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, no tokens, quiet libraries, nothing kept for other runs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
