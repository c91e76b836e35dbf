"""Where documents come from: files, the built-in generator, a dataset on the Hub.

A text is named by one string: `generator`, a path ending in .txt, .json, .jsonl or .parquet, or a dataset id.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from llmshrink.errors import InputError, LlmshrinkError, ModelNotFoundError, UnsafeError
from llmshrink.io.files import parse_json
from llmshrink.model.hub import check_token

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
TEXT_COLUMNS = ("text", "content", "document", "story", "prompt")
KEPT_BYTES = 2**30  # a dataset up to this size goes into the cache
SHUFFLE_WINDOW = 10_000  # documents of a stream that are shuffled together


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
    if data == "generator":
        from llmshrink.demo.generator import CALIBRATION_SEED, EVALUATION_SEED, SETS, stories

        return stories((CALIBRATION_SEED if split == "train" else EVALUATION_SEED) + SETS * seed)
    path = Path(data).expanduser()
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise InputError(f"There is no text file {data!r}.")
        found: Iterable[str] = _read(path, column)
    elif path.exists():
        raise InputError(f"{data!r} is not a text file I can read; known endings: {', '.join(SUFFIXES)}.")
    else:
        found = _from_hub(data, split, column)
    return _shuffled(found, seed) if seed else iter(found)


def _read(path: Path, column: str | None) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            yield from _paragraphs(path)
        elif path.suffix == ".json":
            values = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(values, list):
                raise InputError(f"{path} must hold a JSON list of strings or objects.")
            yield from (_text_of(v, column, path, i) for i, v in enumerate(values))
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_of(parse_json(line), column, path, number)
        else:
            yield from _parquet(path, column)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid {path.suffix[1:]}: {error}.") from error


def _paragraphs(path: Path) -> Iterator[str]:
    """A text file is one document for every stretch between blank lines."""
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).strip()
                lines = []
    if lines:
        yield "".join(lines).strip()


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a parquet file: {error}.") from error
    name = _column(file.schema_arrow.names, column, str(path))
    for batch in file.iter_batches(columns=[name]):
        for value in batch.column(0).to_pylist():
            if not isinstance(value, str | None):
                raise InputError(f"{path}: column {name!r} does not hold text, but values like {value!r}.")
            if value:
                yield value


def _text_of(value: Any, column: str | None, path: Path, number: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        text = value[_column(list(value), column, f"{path}, entry {number}")]
        if isinstance(text, str):
            return text
    raise InputError(f"{path}, entry {number}: expected a string, or an object whose text column is a string.")


def _column(names: list[str], wanted: str | None, where: str) -> str:
    if wanted is not None:
        if wanted not in names:
            raise InputError(f"{where} has no column {wanted!r}; it has: {', '.join(names)}.")
        return wanted
    found = next((name for name in TEXT_COLUMNS if name in names), None)
    if found is None and len(names) != 1:
        raise InputError(f"{where}: which column holds the text? Say it with `column`; it has: {', '.join(names)}.")
    return found or names[0]


def _from_hub(name: str, split: str, column: str | None) -> Iterator[str]:
    from datasets import load_dataset_builder

    check_token()
    repository, _, config = name.partition(":")
    key = None
    try:
        builder = load_dataset_builder(repository, config or None)
        if _is_small(builder):
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
        else:
            rows = builder.as_streaming_dataset(split=split)
        for row in rows:
            key = key or _column(list(row), column, f"dataset {name!r}")
            if row[key]:
                yield str(row[key])
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


def _shuffled(found: Iterable[str], seed: int) -> Iterator[str]:
    order = random.Random(seed)  # noqa: S311 - which rows, not a secret
    stream = iter(found)
    while window := list(islice(stream, SHUFFLE_WINDOW)):
        order.shuffle(window)
        yield from window
