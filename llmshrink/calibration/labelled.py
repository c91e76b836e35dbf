"""Rows with a class each: records of a text and a label, from a file or a dataset."""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmshrink.calibration.rows import Rows
from llmshrink.calibration.text import TEXT_COLUMNS, quiet_datasets
from llmshrink.errors import InputError
from llmshrink.io.files import parse_json

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Labelled(Rows):
    """Rows of which each has a class, by its number in `classes`."""

    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids and classes."""
        told = f"{super().fingerprint} {self.labels} {self.classes}"
        return hashlib.sha256(told.encode()).hexdigest()


def read_labelled(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    label: str,
    text: str | None,
    length: int,
    split: str | None,
    seed: int,
    known: tuple[str, ...] = (),
) -> Labelled:
    """All records of a text, in an order that the seed draws.

    Args:
        data: a .csv (its first line names the columns), .json, .jsonl or .parquet file, or a dataset id on the Hub.
        tokenizer: of the model.
        label: the column or key of the class.
        text: that of the text; None: the first known name.
        length: tokens in a row at most; longer ones are cut.
        split: of a dataset; None: train.
        seed: of the order.
        known: names of the classes that a model has already; empty: those that are found, sorted.

    Raises:
        InputError: a record without text or class (its number is told), a class that the model has not, or fewer than
            two.
    """
    found = [_pair(record, label, text, where) for where, record in _records(data, split or "train")]
    random.Random(seed).shuffle(found)  # noqa: S311 - an order, not a secret
    seen = {name for _, name in found}
    names = known or tuple(sorted(seen, key=lambda name: (not name.isdecimal(), name.isdecimal() and int(name), name)))
    if len(names) < 2:
        raise InputError(f"{data}: column {label!r} holds one class, {names!r}: there is nothing to tell apart.")
    numbers = {name: i for i, name in enumerate(names)} | {str(i): i for i in range(len(known))}
    if strange := next((name for _, name in found if name not in numbers), None):
        raise InputError(f"{data}: the model has no class {strange!r}; it has {', '.join(names)}.")
    rows: tuple[Tensor, ...] = tuple(
        torch.tensor(tokenizer(words, truncation=True, max_length=length)["input_ids"], dtype=torch.long)
        for words, _ in found
    )
    origin = Path(data).name if Path(data).exists() else data
    return Labelled(rows, data, origin, split or "", tuple(numbers[name] for _, name in found), names)


def _pair(record: Any, label: str, text: str | None, where: str) -> tuple[str, str]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object with a text and a class.")
    column = text or next((name for name in TEXT_COLUMNS if name in record), None)
    for name in (column, label):
        if name not in record:
            raise InputError(f"{where} has no column {name!r}; it has: {', '.join(map(str, record))}.")
    words, value = record[column], record[label]
    if not isinstance(words, str) or not words.strip():
        raise InputError(f"{where}: column {column!r} holds no text.")
    if not isinstance(value, str | int) or value == "":
        raise InputError(f"{where}: column {label!r} holds no class, but {value!r}.")
    return words, str(value)


def _records(data: str, split: str) -> Iterator[tuple[str, Any]]:
    """Records, each with where it stands."""
    path = Path(data).expanduser()
    if path.suffix not in SUFFIXES:
        if path.exists():
            raise InputError(f"{data!r} holds no records that I can read; known endings: {', '.join(SUFFIXES)}.")
        yield from _from_hub(data, split)
        return
    if not path.is_file():
        raise InputError(f"There is no file {data!r}.")
    try:
        if path.suffix == ".csv":
            yield from _from_csv(path)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{path}, line {number}", parse_json(line)
        elif path.suffix == ".json":
            for number, record in enumerate(parse_json(path.read_text(encoding="utf-8")), 1):
                yield f"{path}, entry {number}", record
        else:
            from pyarrow.parquet import ParquetFile

            for number, record in enumerate(ParquetFile(path).read().to_pylist(), 1):
                yield f"{path}, row {number}", record
    except (ValueError, TypeError, OSError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as {path.suffix[1:]}: {error}.") from error


def _from_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        for record in reader:
            where = f"{path}, line {reader.line_num}"
            if None in record:
                raise InputError(f"{where} has more values than the first line has names: quote text with commas.")
            yield where, record


def _from_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    load_dataset = quiet_datasets().load_dataset
    repository, _, config = name.partition(":")
    try:
        rows = load_dataset(repository, config or None, split=split)
    except Exception as error:  # noqa: BLE001 - datasets raises its own, the Hub's, fsspec's and plain OS errors
        raise InputError(
            f"There are no records {name!r}: no such file here, and no dataset of that name could be read from the "
            f"Hub (split {split!r}): {type(error).__name__}: {error}"
        ) from error
    for number, record in enumerate(rows, 1):
        yield f"{name}, row {number}", record
