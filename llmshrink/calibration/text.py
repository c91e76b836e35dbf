"""Where documents come from: files, the built-in generator, a dataset on the Hub.

A text is named by one string: `generator`, a path ending in .txt, .json, .jsonl or .parquet, or a dataset id.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llmshrink.errors import InputError, LlmshrinkError, ModelNotFoundError, UnsafeError
from llmshrink.io.files import parse_json
from llmshrink.io.texts import text_file
from llmshrink.model.hub import check_token

if TYPE_CHECKING:
    import pyarrow as pa

TEXT_COLUMNS = ("text", "content", "document", "story", "prompt")
KEPT_BYTES = 2**30  # a dataset up to this size goes into the cache
SHUFFLE_WINDOW = 10_000  # documents of a stream that are shuffled together
LONGEST = 1 << 22  # characters of a document of a text file: longer ones become several
PARQUET_ROWS = 1024  # of a table that are read at a time
SHOWN = 60  # characters of a value that a message repeats

T = TypeVar("T")

Columns = Callable[[list[str], str], list[str]]  # of the names that there are, and where: those that are wanted


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a file or a dataset, as it is there."""

    value: Any
    where: str  # it stands, as people find it


def documents(data: str, *, seed: int, split: str, column: str | None = None) -> Iterator[str]:
    """The documents of a text, one after another.

    Args:
        data: `generator`, a file, or a dataset id on the Hub.
        seed: 0 keeps the order of a file or dataset, another number shuffles it; picks the generator's stories.
        split: `train` or `test`: which split of a dataset, which stories of the generator.
        column: the column or key that holds the text; None: the first known name, or the only column of strings.

    Raises:
        InputError: the file cannot be read as its ending says, or has no such column.
        ModelNotFoundError: no such file or dataset, no permission, or no network.
        UnsafeError: the dataset is loaded by code of its own.
    """

    def wanted(names: list[str], where: str) -> list[str]:
        return [text_column(names, column, where)]

    found = (text_of(record, column) for record in records(data, seed=seed, split=split, columns=wanted))
    return (text for text in found if text)


def records(data: str, *, seed: int, split: str, columns: Columns) -> Iterator[Record]:
    """The entries of a text, one after another, of which one at a time is in memory (of a .json file, all).

    Args:
        data: as for `documents`, like `seed` and `split`.
        seed: as there.
        split: as there.
        columns: which of the columns of a table are read.

    Raises:
        InputError: the file cannot be read as its ending says.
        ModelNotFoundError: no such file or dataset, no permission, or no network.
        UnsafeError: the dataset is loaded by code of its own.
    """
    if data == "generator":
        from llmshrink.demo.generator import CALIBRATION_SEED, EVALUATION_SEED, SETS, stories

        told = stories((CALIBRATION_SEED if split == "train" else EVALUATION_SEED) + SETS * seed)
        return (Record(story, "the generator") for story in told)
    path = text_file(data)
    found = rows_of_hub(data, split, columns) if path is None else _read(path, columns)
    return shuffled(found, seed) if seed else iter(found)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file that is not what its ending says."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid {path.suffix[1:]}: {error}.") from error


def _read(path: Path, columns: Columns) -> Iterator[Record]:
    with reading(path):
        if path.suffix == ".txt":
            yield from _paragraphs(path)
        elif path.suffix == ".json":
            yield from json_entries(path)
        elif path.suffix == ".jsonl":
            with path.open("rb") as lines:
                found = (json_line(line, path, number) for number, line in enumerate(lines, 1))
                yield from (record for record in found if record is not None)
        else:
            batches = parquet_batches(path, columns)
            yield from table(enumerate((row for batch in batches for row in batch.to_pylist()), 1), str(path))


def json_entries(path: Path) -> Iterator[Record]:
    """Those of a list in JSON, which is read whole."""
    values = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(values, list):
        raise InputError(f"{path} must hold a JSON list of strings or objects.")
    return (Record(value, f"{path}, entry {number}") for number, value in enumerate(values))


def json_line(line: bytes, path: Path, number: int) -> Record | None:
    """What a line of JSON holds; None: it is blank."""
    where = f"{path}, line {number}"
    text = line.decode()
    try:
        return Record(parse_json(text), where) if text.strip() else None
    except ValueError as error:
        raise InputError(f"{where} is not valid json: {error}.") from error


def paragraph_starts(path: Path) -> Iterator[int]:
    """The bytes at which the documents of a text file begin, and its end.

    A document is every stretch between blank lines, or of so many characters.
    """
    at = size = 0  # in bytes of the file, in characters of the document
    with path.open(encoding="utf-8", newline="") as file:
        for line in iter(partial(file.readline, LONGEST), ""):
            blank = not line.strip()
            if not blank and not size:
                yield at
            size = 0 if blank or size + len(line) >= LONGEST else size + len(line)
            at += len(line.encode())
    yield at


def paragraph(raw: bytes) -> str:
    """A document of a text file, whose lines end in one way."""
    return raw.decode().replace("\r\n", "\n").replace("\r", "\n").strip()


def _paragraphs(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for start, end in pairwise(paragraph_starts(path)):
            file.seek(start)
            yield Record(paragraph(file.read(end - start)), str(path))


def parquet_batches(path: Path, columns: Columns) -> Iterator[pa.RecordBatch]:
    """The wanted columns of a table, some rows at a time."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a parquet file: {error}.") from error
    yield from file.iter_batches(PARQUET_ROWS, columns=columns(file.schema_arrow.names, str(path)))


def table(rows: Iterable[tuple[int, dict[str, Any]]], name: str) -> Iterator[Record]:
    """The numbered rows of a table that are not empty."""
    for number, row in rows:
        if any(value is not None for value in row.values()):
            yield Record(row, f"{name}, row {number}")


def text_of(record: Record, column: str | None) -> str:
    """The text of an entry: itself, or what stands under the key.

    Raises:
        InputError: it has none.
    """
    value = record.value
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        key = text_column(list(value), column, record.where)
        if isinstance(value[key], str):
            return str(value[key])
        raise InputError(f"{record.where}: expected a string under {key!r}, and there is {_short(value[key])}.")
    raise InputError(f"{record.where}: expected a string, or an object with a text, and there is {_short(value)}.")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."


def text_column(names: list[str], wanted: str | None, where: str) -> str:
    """Which column or key holds the text.

    Raises:
        InputError: there is no such one, or nobody can say.
    """
    if wanted is not None:
        if wanted not in names:
            raise InputError(f"{where} has no column {wanted!r}; it has: {', '.join(names)}.")
        return wanted
    found = next((name for name in TEXT_COLUMNS if name in names), None)
    if found is None and len(names) != 1:
        raise InputError(f"{where}: which column holds the text? Say it with `column`; it has: {', '.join(names)}.")
    return found or names[0]


def quiet_datasets() -> Any:
    """The library, which says nothing below an error and draws no bars; it takes a second to import."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def rows_of_hub(name: str, split: str, columns: Columns, *, drawn: int | None = None) -> Iterator[Record]:
    """The entries of a dataset on the Hub; `drawn` is the seed of their order, None: as they are there.

    Raises:
        ModelNotFoundError: no such dataset, no permission, or no network.
        UnsafeError: the dataset is loaded by code of its own.
    """
    load_dataset_builder = quiet_datasets().load_dataset_builder
    check_token()
    repository, _, config = name.partition(":")
    where = f"dataset {name!r}"
    try:
        builder = load_dataset_builder(repository, config or None)
        stream: Iterator[tuple[int, Any]]
        if _is_small(builder):
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
            stream = enumerate(rows, 1) if drawn is None else ((i + 1, rows[i]) for i in order(len(rows), drawn))
        else:
            stream = enumerate(builder.as_streaming_dataset(split=split), 1)
            stream = stream if drawn is None else shuffled(stream, drawn)
        first = next(stream, None)
        if first is not None:
            wanted = columns(list(first[1]), where)
            chosen = ((number, {key: row[key] for key in wanted}) for number, row in chain([first], stream))
            yield from table(chosen, where)
    except LlmshrinkError:
        raise
    except Exception as error:  # noqa: BLE001 - datasets raises its own, the Hub's, fsspec's and plain OS errors
        if "scripts are no longer supported" in str(error):
            raise UnsafeError(
                f"The dataset {name!r} needs a script of its own: llmshrink does not run code from a dataset.",
                hint="Use a dataset of parquet or JSON files, or export this one to a .jsonl or .parquet file.",
            ) from error
        raise ModelNotFoundError(
            f"There is no text {name!r}: no such file here, and no dataset of that name could be read from the Hub "
            f"(split {split!r}): {type(error).__name__}: {error}",
            hint="Check the name, the network and HF_HUB_OFFLINE; for a private or gated one run `hf auth login` or "
            "set HF_TOKEN. Or give a .txt, .json, .jsonl or .parquet file.",
        ) from error


def _is_small(builder: Any) -> bool:
    """Whether a dataset is kept whole in the cache, to be read again without a network; a larger one is streamed."""
    from huggingface_hub import HfFileSystem

    files = [str(file) for split in (builder.config.data_files or {}).values() for file in split]
    if not all(file.startswith("hf://") for file in files):
        return False
    hub = HfFileSystem()
    return all(total <= KEPT_BYTES for total in accumulate(hub.info(file)["size"] for file in files))


def order(count: int, seed: int) -> Iterator[int]:
    """So many numbers in an order that the seed draws."""
    return map(int, np.random.default_rng(seed).permutation(count))


def shuffled(found: Iterable[T], seed: int) -> Iterator[T]:
    """A stream in an order that the seed draws, stretch by stretch."""
    draw = random.Random(seed)  # noqa: S311 - which rows, not a secret
    stream = iter(found)
    while window := list(islice(stream, SHUFFLE_WINDOW)):
        draw.shuffle(window)
        yield from window
