"""Datasets by id, from a Hub on loopback."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hub import Hub, point_here
from pyarrow import parquet

from llmshrink.calibration import load, text
from llmshrink.errors import InputError, ModelNotFoundError, UnsafeError
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.schema import CalibrationSpec

ID = "owner/texts"
NAME = f"datasets/{ID}"
TOKEN = "hf_" + "secret" * 5
CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*}
- config_name: other
  data_files:
  - {split: train, path: other/train-*}
---
"""


def lines(*documents: str) -> bytes:
    return "".join(json.dumps({"text": document, "n": 1}) + "\n" for document in documents).encode()


def table(*documents: str) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([{"text": document, "n": 1} for document in documents]), buffer)
    return buffer.getvalue()


def read(name: str = ID, split: str = "train", column: str | None = None) -> list[str]:
    return list(text.documents(name, seed=0, split=split, column=column))


def offline(hub: Hub, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("a socket was opened")

    point_here(patch, hub.url, tmp_path / "home", offline=True)
    patch.setattr(socket.socket, "connect", connect)


FILES = {
    "jsonl": {"train.jsonl": lines("One fox.", "Two foxes."), "test.jsonl": lines("Three.")},
    "parquet": {
        "data/train-00000-of-00002.parquet": table("One fox."),
        "data/train-00001-of-00002.parquet": table("Two foxes."),
        "data/test-00000-of-00001.parquet": table("Three."),
    },
}


@pytest.mark.parametrize("kind", FILES)
def test_a_dataset_is_read_and_then_found_in_the_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hub.add(NAME, FILES[kind])
    assert read() == ["One fox.", "Two foxes."] and read(split="test") == ["Three."]
    offline(hub, tmp_path, monkeypatch)
    before = len(hub.requests)
    assert read() == ["One fox.", "Two foxes."] and read(split="test") == ["Three."]
    assert len(hub.requests) == before


def test_a_configuration_is_named_after_a_colon(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(
        NAME, {"README.md": CARD.encode(), "small/train-0.parquet": table("a"), "other/train-0.parquet": table("b")}
    )
    assert read(f"{ID}:small") == ["a"] and read(f"{ID}:other") == ["b"]
    offline(hub, tmp_path, monkeypatch)
    assert read(f"{ID}:other") == ["b"]


def test_a_large_dataset_is_streamed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES["parquet"])
    monkeypatch.setattr(text, "KEPT_BYTES", 100)
    documents = text.documents(ID, seed=0, split="train")
    assert next(documents) == "One fox."
    assert not hub.lines("GET .*train-00001") and list(documents) == ["Two foxes."]
    assert not list((tmp_path / "home").rglob("*.arrow"))


def test_the_column_is_asked_for(hub: Hub) -> None:
    hub.add(NAME, {"train.jsonl": b'{"essay": "x", "n": 1}\n'})
    assert read(column="essay") == ["x"]
    with pytest.raises(InputError, match=r"owner/texts.*which column.*essay, n"):
        read()


def test_a_dataset_with_a_script_is_refused(hub: Hub) -> None:
    hub.add(NAME, {"texts.py": b"raise SystemExit('it ran')", "train.jsonl": lines("a")})
    with pytest.raises(UnsafeError, match=r"owner/texts.*script of its own") as caught:
        read()
    assert caught.value.exit_code == 5


def test_what_cannot_be_read_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES["jsonl"])
    hub.add("datasets/owner/private", FILES["jsonl"], token=TOKEN)
    hub.add("datasets/owner/gated", FILES["jsonl"], gated=True)
    for name, split, words in [
        ("owner/txets", "train", "doesn't exist"),
        (ID, "validation", "validation"),
        (f"{ID}:none", "train", "none"),
        ("owner/private", "train", "hf auth login"),
        ("owner/gated", "train", "gated"),
    ]:
        with pytest.raises(ModelNotFoundError) as caught:
            read(name, split)
        assert name in str(caught.value) and words in str(caught.value) and caught.value.exit_code == 4
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert read("owner/private") == ["One fox.", "Two foxes."]
    with pytest.raises(ModelNotFoundError) as caught:
        read("owner/gated")
    assert TOKEN not in str(caught.value)


def test_a_dataset_that_is_not_in_the_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES["jsonl"])
    offline(hub, tmp_path, monkeypatch)
    with pytest.raises(ModelNotFoundError, match=r"(?s)owner/texts.*HF_HUB_OFFLINE"):
        read()
    assert not hub.requests


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("size", [0, 2**30])
def test_a_broken_download_goes_on(
    hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    hub.add(NAME, FILES[kind])
    monkeypatch.setattr(text, "KEPT_BYTES", size)
    for part in ("/resolve/", "train-00000" if kind == "parquet" else "train.jsonl"):
        hub.fail(f"{part}", status=503)
    hub.fail("GET /datasets" if kind == "jsonl" else "GET /cdn/", cut=20)
    assert read() == ["One fox.", "Two foxes."]


@pytest.mark.parametrize("size", [0, 2**30])
def test_a_short_body_is_never_a_text(hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    hub.add(NAME, FILES["parquet"])
    monkeypatch.setattr(text, "KEPT_BYTES", size)
    hub.fail("GET /cdn/", short=30, times=1000)
    with pytest.raises(ModelNotFoundError, match="owner/texts"):
        read()


def test_a_stream_that_breaks_in_the_middle_is_told(
    hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, FILES["parquet"])
    monkeypatch.setattr(text, "KEPT_BYTES", 0)
    hub.fail("train-00001", status=500, times=1000)
    documents = text.documents(ID, seed=0, split="train")
    assert next(documents) == "One fox."
    with pytest.raises(ModelNotFoundError, match="owner/texts"):
        next(documents)


@pytest.fixture
def answers() -> Iterator[None]:
    """Ask again whether there is a Hub, and forget the answer."""
    load._hub_answers.cache_clear()
    yield
    load._hub_answers.cache_clear()


def test_auto_is_general_text_where_the_hub_answers(
    hub: Hub, models_folder: Callable[..., Path], answers: None, tmp_path: Path
) -> None:
    repository, _, config = load.GENERAL_TEXT.partition(":")
    card = CARD.replace("small", config)
    hub.add(f"datasets/{repository}", {"README.md": card.encode(), f"{config}/train-0.parquet": table("A fox. " * 99)})
    model = StreamedModel(open_source(str(models_folder("llama"))), torch.device("cpu"))
    loader = load.TextLoader(model, embedded=False, progress=Silent())
    rows = loader.calibration(CalibrationSpec(data="auto", samples=4, length=8), 8)
    assert (rows.data, len(rows.tokens), loader.events) == (load.GENERAL_TEXT, 4, [])
