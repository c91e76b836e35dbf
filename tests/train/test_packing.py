"""Rows hold all tokens of their entries once and in order, and none that was to be left out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llmshrink.errors import InputError
from llmshrink.train.packing import Fitting, Row, alone, end_to_end, together
from llmshrink.train.records import Example


def example(number: int, length: int, asked: int = 0) -> Example:
    ids = np.arange(length, dtype=np.int32) + 1000 * number
    return Example(ids, np.arange(length) >= asked, f"line {number}")


def examples(longest: int = 30, count: int = 200) -> list[Example]:
    draw = random.Random(1)
    sizes = [draw.randint(1, longest) for _ in range(count)]
    return [example(i, size, draw.randint(0, size // 2)) for i, size in enumerate(sizes)]


def flat(rows: list[Row]) -> tuple[list[int], list[bool]]:
    return np.concatenate([r.ids for r in rows]).tolist(), np.concatenate([r.learned for r in rows]).tolist()


@pytest.mark.parametrize("longest", [5, 70])
def test_end_to_end_is_one_text_cut_at_every_length(longest: int) -> None:
    entries, length = examples(longest), 16
    rows = list(end_to_end(entries, length))
    ids, learned = (np.concatenate([getattr(e, name) for e in entries]) for name in ("ids", "learned"))
    whole = len(ids) // length * length
    assert flat(rows) == (ids[:whole].tolist(), learned[:whole].tolist()) and {len(r.ids) for r in rows} == {length}
    starts = np.cumsum([0, *(len(e.ids) for e in entries)])
    for i, row in enumerate(rows):
        inside = [start - i * length for start in starts if i * length <= start < (i + 1) * length]
        assert row.begins == (inside[0] if inside else length)


def test_together_keeps_entries_whole_and_wastes_little() -> None:
    entries, length = examples(count=2000), 32
    rows = list(together(entries, length))
    assert all(len(row.ids) <= length and row.begins == 0 for row in rows)
    found: dict[int, list[int]] = {}
    for row in rows:
        numbers = (row.ids // 1000).tolist()
        for number in dict.fromkeys(numbers):
            assert number not in found  # in one row alone
            found[number] = row.ids[row.ids // 1000 == number].tolist()
            marks = row.learned[row.ids // 1000 == number].tolist()
            assert marks == entries[number].learned.tolist()
    assert found == {i: e.ids.tolist() for i, e in enumerate(entries)}
    assert sum(len(row.ids) for row in rows) > 0.95 * length * len(rows)


def test_alone_is_one_entry_to_a_row() -> None:
    assert [row.ids.tolist() for row in alone(examples())] == [e.ids.tolist() for e in examples()]


def test_what_is_too_long_is_cut_or_left_out_and_told() -> None:
    fitting = Fitting(10)
    rows = list(fitting([example(1, 8, 4), example(2, 20, 9), example(3, 20, 10), example(4, 30, 12)]))
    assert [(len(e.ids), int(e.learned.sum())) for e in rows] == [(8, 4), (10, 1)]
    cut, left = fitting.events()
    assert (cut.kind, cut.data) == ("cut_text", {"entries": 1.0})
    assert (left.kind, left.data) == ("left_out", {"entries": 2.0})
    assert "line 3: its prompt of 10 tokens leaves no room for an answer in a row of 10" in left.message


def test_where_nothing_fits_the_first_is_named() -> None:
    with pytest.raises(InputError, match="line 7: its prompt of 12 tokens") as caught:
        list(Fitting(10)([example(7, 20, 12), example(8, 40, 30)]))
    assert "train.length" in str(caught.value.hint)
    with pytest.raises(InputError) as caught:  # rows cannot be longer
        list(Fitting(10, 10)([example(7, 20, 12)]))
    assert "train.length" not in str(caught.value.hint) and "more than 10 positions" in str(caught.value.hint)
    with pytest.raises(InputError, match="line 1: nothing follows its only token"):
        list(Fitting(10)([example(1, 1)]))
