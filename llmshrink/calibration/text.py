"""Where documents come from: files, the built-in generator, a dataset on the Hub.

A text is named by one string: `generator`, a path ending in .txt, .json, .jsonl or .parquet, or a dataset id.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

from llmshrink.errors import InputError, LlmshrinkError, ModelNotFoundError, UnsafeError
from llmshrink.io.files import parse_json
from llmshrink.model.hub import check_token

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
TEXT_COLUMNS = ("text", "content", "document", "story", "prompt")
KEPT_BYTES = 2**30  # a dataset up to this size goes into the cache
SHUFFLE_WINDOW = 10_000  # documents of a stream that are shuffled together
LONGEST = 1 << 22  # characters of a document of a text file: longer ones become several
PARQUET_ROWS = 1024  # of a table that are read at a time
SHOWN = 60  # characters of a value that a message repeats


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
    path = Path(data).expanduser()
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise InputError(f"There is no text file {data!r}.")
        found: Iterable[Record] = _read(path, columns)
    elif path.exists():
        raise InputError(f"{data!r} is not a text file I can read; known endings: {', '.join(SUFFIXES)}.")
    else:
        found = _from_hub(data, split, columns)
    return _shuffled(found, seed) if seed else iter(found)


def _read(path: Path, columns: Columns) -> Iterator[Record]:
    try:
        if path.suffix == ".txt":
            yield from (Record(text, str(path)) for text in _paragraphs(path))
        elif path.suffix == ".json":
            values = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(values, list):
                raise InputError(f"{path} must hold a JSON list of strings or objects.")
            yield from (Record(value, f"{path}, entry {number}") for number, value in enumerate(values))
        elif path.suffix == ".jsonl":
            yield from _lines(path)
        else:
            yield from _parquet(path, columns)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid {path.suffix[1:]}: {error}.") from error


def _paragraphs(path: Path) -> Iterator[str]:
    """A text file is one document for every stretch between blank lines, or of so many characters."""
    lines: list[str] = []
    size = 0
    with path.open(encoding="utf-8") as file:
        for line in iter(partial(file.readline, LONGEST), ""):
            blank = not line.strip()
            if not blank:
                lines.append(line)
                size += len(line)
            if lines and (blank or size >= LONGEST):
                yield "".join(lines).strip()
                lines, size = [], 0
    if lines:
        yield "".join(lines).strip()


def _lines(path: Path) -> Iterator[Record]:
    """JSON, a value on each line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                if line.strip():
                    yield Record(parse_json(line), where)
            except ValueError as error:
                raise InputError(f"{where} is not valid json: {error}.") from error


def _parquet(path: Path, columns: Columns) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a parquet file: {error}.") from error
    wanted = columns(file.schema_arrow.names, str(path))
    rows = (row for batch in file.iter_batches(PARQUET_ROWS, columns=wanted) for row in batch.to_pylist())
    yield from _table(rows, str(path))


def _table(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Record]:
    """The rows of a table that are not empty."""
    for number, row in enumerate(rows, 1):
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


def _from_hub(name: str, split: str, columns: Columns) -> Iterator[Record]:
    load_dataset_builder = quiet_datasets().load_dataset_builder
    check_token()
    repository, _, config = name.partition(":")
    where = f"dataset {name!r}"
    try:
        builder = load_dataset_builder(repository, config or None)
        if _is_small(builder):
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
        else:
            rows = builder.as_streaming_dataset(split=split)
        stream = iter(rows)
        first = next(stream, None)
        if first is not None:
            wanted = columns(list(first), where)
            yield from _table(({key: row[key] for key in wanted} for row in chain([first], stream)), where)
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


def _shuffled(found: Iterable[Record], seed: int) -> Iterator[Record]:
    order = random.Random(seed)  # noqa: S311 - which rows, not a secret
    stream = iter(found)
    while window := list(islice(stream, SHUFFLE_WINDOW)):
        order.shuffle(window)
        yield from window
