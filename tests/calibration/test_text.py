"""Documents come out of every kind of file, and what cannot be read is told."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from llmshrink.calibration.text import documents
from llmshrink.errors import InputError

DOCUMENTS = ["One fox.", "Two\nlines.", "Drei Füchse.", "Four."]


def texts(path: Path, seed: int = 0, column: str | None = None) -> list[str]:
    return list(documents(str(path), seed=seed, split="train", column=column))


def write(path: Path, column: str = "text") -> Path:
    """The documents as a file of the kind that its ending says."""
    objects = [{"id": i, column: document} for i, document in enumerate(DOCUMENTS)]
    if path.suffix == ".txt":
        path.write_text("\n\n".join(DOCUMENTS) + "\n\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(objects), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join([*map(json.dumps, objects), "", ""]), encoding="utf-8")
    else:
        parquet.write_table(pa.Table.from_pylist(objects), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_its_documents(tmp_path: Path, suffix: str) -> None:
    assert texts(write(tmp_path / f"a{suffix}")) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_plain_strings_are_documents(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(json.dumps(DOCUMENTS) if suffix == ".json" else "\n".join(map(json.dumps, DOCUMENTS)))
    assert texts(path) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_the_column_is_found_named_or_asked_for(tmp_path: Path, suffix: str) -> None:
    assert texts(write(tmp_path / f"known{suffix}", "content")) == DOCUMENTS
    other = write(tmp_path / f"other{suffix}", "essay")
    assert texts(other, column="essay") == DOCUMENTS
    with pytest.raises(InputError, match=rf"{other}.*which column holds the text.*id, essay"):
        texts(other)
    with pytest.raises(InputError, match=rf"{other}.*no column 'text'; it has: id, essay"):
        texts(other, column="text")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'{"text": "no list"}', "must hold a JSON list"),
        ("a.json", b"[1, 2]", "entry 0: expected a string"),
        ("a.json", b'["cut', "not valid json"),
        ("a.jsonl", b'{"text": "good"}\n{"text": 5}', "line 2: expected a string"),
        ("a.jsonl", b'"good"\n{"te', "line 2 is not valid json"),
        ("a.txt", b"Stra\xdfe", "not UTF-8"),
        ("a.parquet", b"PAR1 not at all", "not a parquet file"),
        ("a.csv", b"text\nfox", r"known endings: \.txt, \.json, \.jsonl, \.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        texts(tmp_path / name)
    assert caught.value.exit_code == 8 and str(tmp_path / name) in str(caught.value)


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet.*'text'"):
        texts(tmp_path / "a.parquet")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing.txt"):
        texts(tmp_path / "nothing.txt")


def test_seeds_shuffle_and_zero_keeps_the_order(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([str(number) for number in range(200)]))
    first = texts(path, seed=1)
    assert texts(path) == [str(number) for number in range(200)]
    assert first != texts(path) and sorted(first) == sorted(texts(path))
    assert first == texts(path, seed=1) != texts(path, seed=2)


def test_the_generator_has_splits_and_seeds_without_a_common_story() -> None:
    def some(split: str, seed: int) -> list[str]:
        return list(islice(documents("generator", seed=seed, split=split), 40))

    assert some("train", 0) == some("train", 0)
    sets = [set(some(split, seed)) for split in ("train", "test") for seed in (0, 1)]
    assert not any(a & b for i, a in enumerate(sets) for b in sets[:i])
