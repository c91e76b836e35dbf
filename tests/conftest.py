"""Tiny models built once, texts, and an environment without network or tokens."""

from __future__ import annotations

import json
import os
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
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, no tokens, quiet libraries, two threads."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
