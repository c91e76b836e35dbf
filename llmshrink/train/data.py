"""Rows to train on, in a file that is mapped into memory: of a long text only what is looked at is in it.

The file is a stream of Arrow, as `datasets` writes it too: of each row its ids, on which of them the loss is taken, and
where the first entry begins that begins in it. A sealed line beside it says what it was made of, and its SHA-256.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llmshrink.calibration.rows import Rows
from llmshrink.errors import InputError
from llmshrink.forms import Event
from llmshrink.io.files import atomic_file, has_hash, sealed, unsealed, write_bytes
from llmshrink.report.schema import TextReport
from llmshrink.train.packing import Row

ARROW, SEAL = "rows.arrow", "rows.json"  # in a folder of their own
TOGETHER = 1024  # rows that are written at a time
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of a stream
SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("learned", pa.list_(pa.bool_())), ("begins", pa.int32())])
IGNORED = -100  # a label that no loss counts


class Held(Protocol):
    """Some of what there is."""

    def __len__(self) -> int: ...

    @property
    def counted(self) -> int:
        """Places at which the loss is taken."""
        ...


class Lines(Protocol):
    """What there is to learn from."""

    @property
    def told(self) -> TextReport:
        """What a report says about it."""
        ...

    def __len__(self) -> int: ...

    def parts(self, held: int) -> tuple[Held, Held]:
        """Rows to learn from, and `held` others, which are measured."""
        ...


@dataclass(frozen=True)
class Examples:
    """Rows on disk, with what a report says about them."""

    folder: Path
    table: pa.Table
    told: TextReport
    events: list[Event]  # that happened while they were made

    def __len__(self) -> int:
        return len(self.table)

    def parts(self, held: int) -> tuple[Part, Part]:
        """The rows to learn from, and `held` others, which are measured.

        These are drawn evenly; where entries are cut at the ends of rows they are the last. No entry is in both: what
        is left of one that was learned from is not measured, where anything else is.
        """
        count = len(self)
        first, begins = count - held, self.table["begins"]
        if held and not pc.any(pc.not_equal(begins, 0)).as_py():
            seen = [(2 * i + 1) * count // (2 * held) for i in range(held)]
            return Part(self.table, sorted(set(range(count)) - set(seen))), Part(self.table, seen)
        whole = next((row for row in range(first, count) if begins[row].as_py() < len(self.table["ids"][row])), None)
        if whole is None:
            return Part(self.table, range(first)), Part(self.table, range(first, count))
        return Part(self.table, range(first)), Part(self.table, range(whole, count), begins[whole].as_py())

    @property
    def count(self) -> int:
        """Tokens of all rows."""
        return self.told.tokens

    def ids(self, row: int) -> Tensor:
        """The tokens of a row, int64 [length]."""
        return torch.from_numpy(self.table["ids"][row].values.to_numpy().astype(np.int64))

    def parted(self, tokens: int) -> list[range]:
        """Stretches of rows with at most so many tokens (at least one row), in order."""
        found, seen = [range(0)], 0
        for row, length in enumerate(pc.list_value_length(self.table["ids"]).to_pylist()):
            if found[-1] and seen + length > tokens:
                found.append(range(row, row))
                seen = 0
            found[-1], seen = range(found[-1].start, row + 1), seen + length
        return found

    def rows(self, which: range) -> Rows:
        """Some rows, in memory."""
        return Rows(tuple(map(self.ids, which)), self.told.data, self.told.origin, self.told.split)

    def moved(self, folder: Path) -> Examples:
        """The same in another folder."""
        if folder == self.folder:
            return self
        shutil.rmtree(folder, ignore_errors=True)
        self.folder.rename(folder)
        return replace(self, folder=folder)

    @classmethod
    def load(cls, folder: Path, key: dict[str, Any] | None) -> Examples | None:
        """What `write` left for this key, or for any; None where it is missing, damaged, or of another."""
        path = folder / SEAL
        kept = unsealed(path.read_bytes()) if path.is_file() else None
        try:
            if kept is None or key not in (None, kept["key"]) or not has_hash(folder / ARROW, kept["sha256"]):
                return None
            events = [Event(**event) for event in kept["events"]]
            return cls(folder, _mapped(folder / ARROW), TextReport.model_validate(kept["told"]), events)
        except (LookupError, TypeError, ValueError):  # whole, but laid out by another release
            return None


@dataclass(frozen=True)
class Learned:
    """A text that somebody named to learn from, which is calibrated with too."""

    examples: Examples
    held: int  # rows of it that are held back

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        return self.examples.told.origin

    def rows(self, samples: int, length: int) -> Rows:
        """As many tokens as so many rows of one length, in rows that are no longer; none that are held back."""
        told, room = self.examples.told, samples * length
        part, found = self.examples.parts(self.held)[0], list[Tensor]()
        for row in range(len(part)):
            ids = part[row]["input_ids"][:length]
            if len(ids) > room:
                break
            found.append(ids)
            room -= len(ids)
        return Rows(tuple(found), told.data, told.origin, told.split)


class Part(Dataset[dict[str, Tensor]]):
    """Some of the rows, one after another."""

    def __init__(self, table: pa.Table, rows: Sequence[int], seen: int = 0) -> None:
        """`seen`: tokens at the beginning of the first row on which no loss is taken."""
        self._ids, self._learned = table["ids"], table["learned"]
        self._rows, self._seen = rows, seen

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Ids and labels, int64 [length]; a label of -100 where no loss is taken."""
        row = self._rows[index]
        ids = torch.from_numpy(self._ids[row].values.to_numpy().astype(np.int64))
        learned = torch.from_numpy(self._learned[row].values.to_numpy(zero_copy_only=False))
        learned[: self._seen * (index == 0)] = False
        return {"input_ids": ids, "labels": torch.where(learned, ids, IGNORED)}

    @cached_property
    def counted(self) -> int:
        """Tokens on which the loss is taken."""
        return sum(int((self[i]["labels"] != IGNORED).sum()) for i in range(len(self)))


def averaged(labels: Tensor, held: Any) -> Tensor | float:
    """What a measured batch is divided by, so that Trainer's mean over rows of `held` is one over tokens."""
    return len(labels) * held.counted / len(held) if isinstance(held, Part) else (labels != IGNORED).sum()


def collate(entries: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows, padded behind to the longest; whatever else an entry holds is stacked.

    transformers' own collators ask the tokenizer to pad, and many have no token for that: none is needed, as padding is
    neither attended to nor learned.
    """
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    full = [{**entry, "attention_mask": torch.ones_like(entry["input_ids"])} for entry in entries]
    return {
        key: pad_sequence([entry[key] for entry in full], batch_first=True, padding_value=padding[key])
        if key in padding
        else torch.as_tensor([entry[key] for entry in full])
        for key in full[0]
    }


def write(
    folder: Path, rows: Iterable[Row], key: dict[str, Any], about: Callable[[], tuple[TextReport, list[Event]]]
) -> Examples:
    """Write rows as they come, and map them.

    Args:
        folder: that holds nothing else.
        rows: in order.
        key: what they depend on.
        about: what is to be told of them once all are there, but for what is counted here; and what happened.

    Raises:
        InputError: there is no row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest, count, longest, tokens, counted = hashlib.sha256(), 0, 0, 0, 0
    with atomic_file(folder / ARROW) as file:
        file.write(SCHEMA.serialize())
        for batch in _batches(rows):
            for row in batch:
                row.learned[0] = False  # nothing says what it is
                digest.update(len(row.ids).to_bytes(8, "little") + row.ids.tobytes() + row.learned.tobytes())
                count, longest, tokens = count + 1, max(longest, len(row.ids)), tokens + len(row.ids)
                counted += int(row.learned.sum())
            file.write(_packed(batch).serialize())
        file.write(END)
        told, events = about()
        if not count:
            raise InputError(
                f"The text {told.data!r} is too short to train on.", hint="Give more, or a smaller length."
            )
    found = {"fingerprint": digest.hexdigest(), "rows": count, "length": longest, "tokens": tokens, "counted": counted}
    told = told.model_copy(update=found)
    kept = {"key": key, "sha256": file.sha256, "told": told.model_dump(mode="json")}
    write_bytes(folder / SEAL, sealed({**kept, "events": [vars(event) for event in events]}))
    return Examples(folder, _mapped(folder / ARROW), told, events)


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def _batches(rows: Iterable[Row]) -> Iterable[list[Row]]:
    left = iter(rows)
    return iter(lambda: list(itertools.islice(left, TOGETHER)), [])


def _packed(rows: list[Row]) -> pa.RecordBatch:
    ends = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int32)
    columns = [np.concatenate([getattr(row, name) for row in rows]) for name in ("ids", "learned")]
    lists = [pa.ListArray.from_arrays(pa.array(ends), pa.array(column)) for column in columns]
    return pa.RecordBatch.from_arrays([*lists, pa.array([row.begins for row in rows], pa.int32())], schema=SCHEMA)
