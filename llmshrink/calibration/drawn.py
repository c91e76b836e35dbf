"""The entries of a text in an order that is drawn over all of it: the first of them are a fair sample of the whole.

Of a file only is in memory where each entry begins (a .json file is read whole): 8 bytes for an entry, and as many for
the order.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path

from llmshrink.calibration.text import (
    Columns,
    Record,
    json_entries,
    json_line,
    order,
    paragraph,
    paragraph_starts,
    parquet_batches,
    reading,
    records,
    rows_of_hub,
    table,
)
from llmshrink.io.files import disk_faults
from llmshrink.io.texts import text_file

Entries = tuple[int, Callable[[int], Record | None]]  # how many there are, and each of them; None: it is blank


def drawn(data: str, *, seed: int, split: str, columns: Columns) -> Iterator[Record]:
    """The entries of a text in an order that is drawn, of which one at a time is in memory.

    Args:
        data: `generator`, a file, or a dataset id on the Hub; one that is streamed is mixed in stretches alone.
        seed: of the order; which of the generator's stories.
        split: `train` or `test`: which split of a dataset, which stories of the generator.
        columns: which of the columns of a table are read; it is asked of the keys of the first entry of a file too.

    Raises:
        InputError: the file cannot be read as its ending says.
        ModelNotFoundError: no such file or dataset, no permission, or no network.
        UnsafeError: the dataset is loaded by code of its own.
    """
    if data == "generator":  # every story is drawn
        return records(data, seed=seed, split=split, columns=columns)
    path = text_file(data)
    return rows_of_hub(data, split, columns, drawn=seed) if path is None else _of_file(path, columns, seed)


def _of_file(path: Path, columns: Columns, seed: int) -> Iterator[Record]:
    with reading(path), _KINDS[path.suffix](path, columns) as (count, entry):
        if path.suffix in (".json", ".jsonl"):
            first = next((found for i in range(count) if (found := entry(i)) is not None), None)
            if first is not None and isinstance(first.value, dict):
                columns(list(first.value), first.where)
        for i in order(count, seed):
            if (found := entry(i)) is not None:
                yield found


@contextmanager
def _list(path: Path, columns: Columns) -> Iterator[Entries]:
    entries = list(json_entries(path))
    yield len(entries), entries.__getitem__


@contextmanager
def _lines(path: Path, columns: Columns) -> Iterator[Entries]:
    starts = array("q", [0])
    with path.open("rb") as file:
        for line in file:
            starts.append(starts[-1] + len(line))

        def entry(i: int) -> Record | None:
            file.seek(starts[i])
            return json_line(file.readline(), path, i + 1)

        yield len(starts) - 1, entry


@contextmanager
def _paragraphs(path: Path, columns: Columns) -> Iterator[Entries]:
    starts = array("q", paragraph_starts(path))
    with path.open("rb") as file:

        def entry(i: int) -> Record | None:
            file.seek(starts[i])
            return Record(paragraph(file.read(starts[i + 1] - starts[i])), str(path))

        yield len(starts) - 1, entry


@contextmanager
def _table(path: Path, columns: Columns) -> Iterator[Entries]:
    """Rows of parquet lie in groups that are read as a whole: they are laid out in a file where each is found."""
    import pyarrow as pa

    folder = Path(tempfile.gettempdir())
    with disk_faults(folder, path.stat().st_size), tempfile.TemporaryDirectory(prefix="llmshrink-") as own:
        batches = parquet_batches(path, columns)
        first = next(batches, None)
        if first is None:
            yield 0, lambda _: None
            return
        with pa.OSFile(f"{own}/rows", "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
            for batch in chain([first], batches):
                writer.write_batch(batch)
        with pa.memory_map(f"{own}/rows") as source:
            rows = pa.ipc.open_stream(source).read_all()
            yield len(rows), lambda i: next(table([(i + 1, rows.slice(i, 1).to_pylist()[0])], str(path)), None)


_KINDS: dict[str, Callable[[Path, Columns], AbstractContextManager[Entries]]] = {
    ".json": _list,
    ".jsonl": _lines,
    ".txt": _paragraphs,
    ".parquet": _table,
}
