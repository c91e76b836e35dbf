"""Any part of a text is drawn first, each entry once, and named where it stands."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
from hub import Hub
from pyarrow import parquet

from llmshrink.calibration import text as module
from llmshrink.calibration.drawn import drawn
from llmshrink.calibration.text import Record, records
from llmshrink.errors import InputError
from llmshrink.io.texts import text_file

COUNT = 3000
SUFFIXES = [".txt", ".json", ".jsonl", ".parquet"]


def everything(names: list[str], where: str) -> list[str]:
    return names


def write(path: Path, texts: list[str]) -> Path:
    """The texts as a file of the kind that its ending says; lines that are blank between them."""
    objects = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if path.suffix == ".txt":
        path.write_bytes("\r\n \r\n\r\n".join(texts).encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(objects), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in objects), encoding="utf-8")
    else:
        parquet.write_table(pa.Table.from_pylist(objects), path)
    return path


def read(path: Path | str, seed: int = 0) -> list[Record]:
    return list(drawn(str(path), seed=seed, split="train", columns=everything))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_part_of_a_file_comes_first(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", [f"Füchse {number}\nagain" for number in range(COUNT)])
    ordered = list(records(str(path), seed=0, split="train", columns=everything))
    found = {seed: read(path, seed) for seed in (0, 1)}
    key = repr
    assert found[0] == read(path) != found[1] and ordered not in found.values()
    assert sorted(found[0], key=key) == sorted(found[1], key=key) == sorted(ordered, key=key)
    assert len(ordered) == COUNT
    places = {repr(record): number for number, record in enumerate(ordered)}
    for seed in (0, 1):
        some = [
            places[repr(record)] for record in islice(drawn(str(path), seed=seed, split="", columns=everything), 300)
        ]
        tenths = [sum(place * 10 // COUNT == tenth for place in some) for tenth in range(10)]
        assert min(tenths) > 12 and max(tenths) < 55  # 30 each, give or take 5


def test_the_first_entry_tells_the_keys(tmp_path: Path) -> None:
    for suffix in (".json", ".jsonl", ".parquet"):
        asked: list[tuple[list[str], str]] = []
        path = write(tmp_path / f"a{suffix}", ["One", "Two"])

        def columns(names: list[str], where: str, asked: list[tuple[list[str], str]] = asked) -> list[str]:
            asked.append((names, where))
            return names

        list(drawn(str(path), seed=3, split="train", columns=columns))
        place = {".json": ", entry 0", ".jsonl": ", line 1", ".parquet": ""}[suffix]
        assert asked == [(["id", "text"], f"{path}{place}")]


def test_a_long_text_without_blank_lines_is_cut_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 7)
    (tmp_path / "a.txt").write_text("äöü äöü äöü\nb\n\nc" + "d" * 20, encoding="utf-8")
    found = [record.value for record in records(str(tmp_path / "a.txt"), seed=0, split="", columns=everything)]
    assert found == ["äöü äöü", "äöü\nb", "cdddddd", "ddddddd", "ddddddd"]
    assert sorted(record.value for record in read(tmp_path / "a.txt")) == sorted(found)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_has_no_entries(tmp_path: Path, suffix: str) -> None:
    assert read(write(tmp_path / f"a{suffix}", [])) == []


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"good"\n\n{"te\n"good"')
    with pytest.raises(InputError, match=r"a\.jsonl, line 3 is not valid json"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kept", [0, 2**30])
def test_a_dataset_is_drawn_from_or_mixed_as_it_comes(hub: Hub, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", kept)
    lines = [json.dumps({"text": str(number)}) for number in range(40)]
    hub.add("datasets/owner/texts", {"train.jsonl": "\n".join(lines).encode()})
    found = read("owner/texts")
    numbers = [int(record.value["text"]) for record in found]
    assert sorted(numbers) == list(range(40)) != numbers
    assert [record.where for record in found] == [f"dataset 'owner/texts', row {number + 1}" for number in numbers]


@pytest.mark.parametrize("name", ["missing.jsonl", "/none/such", "./none", "../none", "~/none.d"])
def test_a_file_that_is_not_there_is_told_from_a_dataset(name: str) -> None:
    assert text_file("owner/texts:config") is None
    with pytest.raises(InputError, match="There is no text file"):
        text_file(name)
