"""What is written is mapped as it was, parted without a common entry, and padded so that nothing sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import config
from transformers import AutoModelForCausalLM

from llmshrink.calibration.rows import Rows
from llmshrink.errors import InputError
from llmshrink.forms import Event
from llmshrink.report.schema import TextReport
from llmshrink.train import data as module
from llmshrink.train.data import ARROW, SEAL, Examples, Learned, collate, write
from llmshrink.train.overlap import overlaps
from llmshrink.train.packing import Row

KEY, TOLD = {"length": 9}, TextReport(data="a.txt", origin="a.txt", kind="prompt")
EVENTS = [Event("cut_text", "cut", data={"entries": 1.0})]


def rows(count: int = 7, seed: int = 0) -> list[Row]:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(2, 10, count)
    return [
        Row(draw.integers(0, 160, size, dtype=np.int32), draw.random(size) < 0.6, int(draw.integers(0, size + 1)))
        for size in sizes
    ]


def written(folder: Path, given: list[Row]) -> Examples:
    return write(folder, iter(given), KEY, lambda: (TOLD, EVENTS))


def labels(row: Row) -> list[int]:
    return [-100, *(int(i) if mark else -100 for i, mark in zip(row.ids[1:], row.learned[1:], strict=True))]


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 3)
    made = written(tmp_path / "text", rows())
    again = Examples.load(tmp_path / "text", KEY)
    assert again is not None and again.told == made.told and again.events == EVENTS
    for examples in (made, again, again.moved(tmp_path / "there")):
        part, none = examples.parts(0)
        assert [part[i]["input_ids"].tolist() for i in range(7)] == [row.ids.tolist() for row in rows()]
        assert [part[i]["labels"].tolist() for i in range(7)] == [labels(row) for row in rows()]
        assert part.counted == examples.told.counted == sum(i != -100 for row in rows() for i in labels(row))
        assert len(none) == 0
    assert (made.told.rows, made.told.tokens) == (7, sum(len(row.ids) for row in rows()))
    assert Dataset.from_file(str(tmp_path / "there" / ARROW))["ids"] == [row.ids.tolist() for row in rows()]
    fewer = written(tmp_path / "fewer", rows()[:-1]).told
    assert fewer.fingerprint != made.told.fingerprint


def test_what_is_damaged_or_of_another_run_is_not_read(tmp_path: Path) -> None:
    written(tmp_path, rows())
    assert Examples.load(tmp_path, {"length": 8}) is None and Examples.load(tmp_path / "none", KEY) is None
    for name in (ARROW, SEAL):
        whole = (tmp_path / name).read_bytes()
        for harmed in (whole[:-9], whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :]):
            (tmp_path / name).write_bytes(harmed)
            assert Examples.load(tmp_path, KEY) is None
        (tmp_path / name).write_bytes(whole)
    assert Examples.load(tmp_path, KEY) is not None


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'a\.txt' is too short"):
        written(tmp_path / "text", [])
    assert not any((tmp_path / "text").iterdir())


@pytest.mark.parametrize(
    ("begins", "held", "marks"),
    [
        ([0, 4, 4, 2, 0], [3, 4], {3: 2}),  # row 2 and the beginning of row 3 go on with what row 1 begins
        ([0, 4, 0, 4, 4], [2, 3, 4], {}),
        ([0, 4, 4, 4, 4], [2, 3, 4], {}),  # one entry is all there is
    ],
)
def test_no_entry_is_learned_and_measured(
    tmp_path: Path, begins: list[int], held: list[int], marks: dict[int, int]
) -> None:
    given = [Row(np.arange(4, dtype=np.int32) + 10 * i, np.ones(4, dtype=bool), at) for i, at in enumerate(begins)]
    learned, measured = written(tmp_path, given).parts(3)
    assert [int(learned[i]["input_ids"][0]) // 10 for i in range(len(learned))] == [0, 1]
    assert [int(measured[i]["input_ids"][0]) // 10 for i in range(len(measured))] == held
    for i, row in enumerate(held):
        assert (measured[i]["labels"] == -100).sum() == max(1, marks.get(row, 0))


def test_rows_of_whole_entries_are_held_back_evenly(tmp_path: Path) -> None:
    given = [Row(np.full(4, i, dtype=np.int32), np.ones(4, dtype=bool), 0) for i in range(100)]
    found = [[int(part[i]["input_ids"][0]) for i in range(len(part))] for part in written(tmp_path, given).parts(5)]
    assert found[1] == [10, 30, 50, 70, 90] and found[0] == [i for i in range(100) if i not in found[1]]
    assert written(tmp_path / "more", given).parts(5)[1].counted == 5 * 3  # all of each, but for its first


@pytest.mark.parametrize(("samples", "length", "count"), [(1, 8, 2), (2, 3, 2), (1, 2, 1), (9, 99, 95)])
def test_what_is_learned_from_is_calibrated_with(tmp_path: Path, samples: int, length: int, count: int) -> None:
    given = [Row(np.full(4, i, dtype=np.int32), np.ones(4, dtype=bool), 0) for i in range(100)]
    found = Learned(written(tmp_path, given), 5).rows(samples, length)
    assert found.origin == "a.txt" and {len(row) for row in found.tokens} == {min(4, length)}
    free = [i for i in range(100) if i not in (10, 30, 50, 70, 90)]  # not held back
    assert [int(row[0]) for row in found.tokens] == free[:count]


def test_padding_changes_no_logits(tmp_path: Path) -> None:
    part, _ = written(tmp_path, rows()).parts(0)
    batch = collate([{**part[i], "row": i} for i in range(7)])
    assert batch["row"].tolist() == list(range(7))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("llama")).eval()
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for i in range(7):
            length = len(part[i]["input_ids"])
            alone = model(input_ids=part[i]["input_ids"][None]).logits[0]
            assert torch.allclose(found[i, :length], alone, atol=1e-5)
            assert (batch["labels"][i, length:] == -100).all() and not batch["attention_mask"][i, length:].any()


def text(tokens: list[torch.Tensor], data: str = "b.txt", split: str = "test") -> Rows:
    return Rows(tuple(tokens), data, data, split)


def test_a_stretch_that_was_learned_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 16)  # so that the stretch below lies in two parts of the file
    draw = torch.Generator().manual_seed(0)
    learned = torch.randint(0, 160, (40, 64), generator=draw)
    given = [Row(row.numpy().astype(np.int32), np.ones(64, dtype=bool), 0) for row in learned]
    examples = written(tmp_path, given)
    other = [torch.randint(0, 160, (64,), generator=draw) for _ in range(3)]
    shifted = torch.cat([other[0][:50], learned.flatten()[1000:1050]])  # of two rows, and not where it stood
    kinds = [
        [event.kind for event in overlaps(examples, [rows])]
        for rows in (text(other), text([*other, shifted]), text([shifted[:-1]]), text(other, "a.txt", "train"))
    ]
    assert kinds == [[], ["shared_corpus"], [], ["shared_corpus"]]
    (event,) = overlaps(examples, [text([*other, shifted])])
    assert event.message.startswith("training and evaluation share a text: b.txt")
