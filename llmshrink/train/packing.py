"""From the tokens of entries to rows of at most one length.

Tokens of one row see all that stands before them in it, of other entries too: telling these apart needs kernels of
attention that not every model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmshrink.calibration.rows import MIN_ROW
from llmshrink.errors import InputError
from llmshrink.forms import Event
from llmshrink.train.records import Example

OPEN = 64  # rows that still have room, among which the fullest is looked for


@dataclass(frozen=True, slots=True)
class Row:
    """One row."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]  # of each token: whether the loss is taken on it
    begins: int  # where the first entry that begins in it does; its length if none does


class Fitting:
    """Entries that are too long for a row: their ends are cut off, and what leaves nothing to learn is left out."""

    def __init__(self, length: int, positions: int | None = None) -> None:
        """`length`: tokens of a row; `positions`: those that the model has; None: no end is known."""
        self._length, self._positions = length, positions
        self._first: Example | None = None  # that was left out
        self._kept = self._cut = self._left = 0

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Those that are left, in order.

        Raises:
            InputError: none is.
        """
        for example in examples:
            if not example.learned[1 : self._length].any():
                self._first = self._first or example
                self._left += 1
                continue
            self._kept += 1
            if len(example.ids) > self._length:
                self._cut += 1
                example = Example(example.ids[: self._length], example.learned[: self._length], example.where)
            yield example
        if self._first is not None and not self._kept:
            raise InputError(self._why(), hint=self._help())

    def _why(self) -> str:
        assert self._first is not None
        ids, learned, where = self._first.ids, self._first.learned, self._first.where
        if len(ids) < MIN_ROW:
            return f"{where}: nothing follows its only token."
        asked = int(np.argmax(learned))
        return f"{where}: its prompt of {asked} tokens leaves no room for an answer in a row of {self._length}."

    def _help(self) -> str:
        assert self._first is not None
        if len(self._first.ids) < MIN_ROW:
            return "Give longer texts."
        if self._positions is not None and self._length >= self._positions:
            return f"Shorten the prompts, or take a model with more than {self._positions} positions: rows fill them."
        return "Raise train.length (--set train.length=N), or shorten what is asked."

    def events(self) -> list[Event]:
        """What happened, once all have been seen."""
        found = []
        if self._cut:
            message = f"{self._cut} entries are longer than a row of {self._length} tokens: their ends are cut off"
            found.append(Event("cut_text", message, data={"entries": float(self._cut)}))
        if self._left:
            message = f"{self._left} entries are left out, the first of them {self._why()}"
            found.append(Event("left_out", message, data={"entries": float(self._left)}))
        return found


def end_to_end(examples: Iterable[Example], length: int) -> Iterator[Row]:
    """Rows of exactly one length, entries one behind the other and cut where a row ends; the last is left out."""
    ids, learned = np.empty(length, dtype=np.int32), np.empty(length, dtype=np.bool_)
    filled, begins = 0, length
    for example in examples:
        begins, done = min(begins, filled), 0
        while done < len(example.ids):
            count = min(length - filled, len(example.ids) - done)
            ids[filled : filled + count] = example.ids[done : done + count]
            learned[filled : filled + count] = example.learned[done : done + count]
            filled, done = filled + count, done + count
            if filled == length:
                yield Row(ids.copy(), learned.copy(), begins)
                filled, begins = 0, length


def together(examples: Iterable[Example], length: int) -> Iterator[Row]:
    """Several whole entries to a row: each goes into the fullest row that has room for it (best fit)."""
    rows: list[list[Example]] = []
    sizes: list[int] = []
    for example in examples:
        fitting = [i for i, size in enumerate(sizes) if size + len(example.ids) <= length]
        if not fitting:
            if len(rows) == OPEN:
                full = max(range(OPEN), key=sizes.__getitem__)
                del sizes[full]
                yield _joined(rows.pop(full))
            fitting = [len(rows)]
            rows.append([])
            sizes.append(0)
        place = max(fitting, key=sizes.__getitem__)
        rows[place].append(example)
        sizes[place] += len(example.ids)
    yield from map(_joined, rows)


def alone(examples: Iterable[Example]) -> Iterator[Row]:
    """Each entry in a row of its own."""
    return (_joined([example]) for example in examples)


def _joined(examples: list[Example]) -> Row:
    ids, learned = (np.concatenate([getattr(e, name) for e in examples]) for name in ("ids", "learned"))
    return Row(ids, learned, 0)
