"""From what a recipe says of the text to train on, to rows on disk."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from llmshrink.calibration.drawn import drawn
from llmshrink.calibration.load import TextLoader, origin
from llmshrink.errors import InputError, OutputError
from llmshrink.forms import Event
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.steps import Steps
from llmshrink.progress import Progress
from llmshrink.report.schema import TextReport
from llmshrink.train.data import Examples, Lines, write
from llmshrink.train.packing import Fitting, Row, alone, end_to_end, together
from llmshrink.train.records import Example, Records

DECIDES = ("data", "split", "column", "kind", "answers_only", "packing", "seed", "hold", "batch", "accumulate")
LIMITS = ("max_steps", "max_tokens")
T = TypeVar("T", bound=Lines)


def prepare(
    steps: Steps, model: StreamedModel, loader: TextLoader, folder: Path, *, kept: Path | None, progress: Progress
) -> Examples:
    """The rows of a training: those that an unfinished run began with, or new ones.

    What `auto` means depends on the network, and sampling takes long: neither is done again in the middle of a run.

    Args:
        steps: of the training, whose recipe says which text, and how much of it can be needed.
        model: whose tokenizer reads it.
        loader: knows what `auto` and `self` are.
        folder: to write new ones to.
        kept: where those of an unfinished run would lie; None: it is not gone on with.
        progress: told of the tokens.

    Raises:
        InputError: the text gives nothing to learn from, or an entry, which is named, is none.
        PlanError: its rows do not go with the limits.
    """
    decides = {name: value for name, value in steps.spec.model_dump(mode="json").items() if name in (*DECIDES, *LIMITS)}
    key = {"model": model.source.hashes, "train": decides, "length": steps.length}
    found = None if kept is None else Examples.load(kept, key)
    if found is not None:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    try:
        made = _made(steps, model, loader, folder, key, progress)
        steps.check_rows(len(made), made.count)
        return made
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # what was there before stays
            folder.parent.rmdir()
            folder.parent.parent.rmdir()
        raise


def chosen(found: T | None, fingerprint: str) -> T:
    """Rows that this process found, once they are those that the first of several learns from.

    Raises:
        OutputError: they are others, or there are none.
    """
    if found is None or found.told.fingerprint != fingerprint:
        raise OutputError(
            "This process does not see the text that the first process chose.",
            hint="All processes must see the same folders: --output and --data on a disk that they share.",
        )
    return found


def _made(
    steps: Steps, model: StreamedModel, loader: TextLoader, folder: Path, key: dict[str, Any], progress: Progress
) -> Examples:
    spec, known = steps.spec, len(loader.events)
    data, split = loader.source(spec.data, "trained"), spec.split or "train"
    told = TextReport(data=data, split=split, origin=origin(data, split), kind="text")
    chosen = [loader.events.pop() for _ in loader.events[known:]]
    if data == "self":
        sampled = loader.samples(steps.rows, steps.length, spec.seed)
        told = told.model_copy(update={"origin": sampled.origin})
        return write(folder, map(_whole, sampled.tokens), key, lambda: (told, chosen))
    reader, fitting = Records(spec, model.source.tokenizer), Fitting(steps.length, model.positions)
    examples = reader.examples(drawn(data, seed=spec.seed, split=split, columns=reader.columns))
    first = next(examples, None)
    if first is None:
        raise InputError(f"The text {data!r} is empty.", hint="Name another (--data).")
    examples = itertools.chain([first], examples)
    rows = _enough(_rows(examples, reader, fitting, steps), steps, progress)

    def about() -> tuple[TextReport, list[Event]]:
        return told.model_copy(update={"kind": reader.kind or "text"}), [*chosen, *fitting.events()]

    progress.start("read the text", 0)
    made = write(folder, rows, key, about)
    progress.finish()
    return made


def _rows(examples: Iterator[Example], reader: Records, fitting: Fitting, steps: Steps) -> Iterator[Row]:
    """The rows of all entries; what they are is known, as the first of them was read."""
    if not steps.spec.packing:
        return alone(fitting(examples))
    return end_to_end(examples, steps.length) if reader.kind == "text" else together(fitting(examples), steps.length)


def _enough(rows: Iterable[Row], steps: Steps, progress: Progress) -> Iterator[Row]:
    """As many as the steps can need."""
    tokens = 0
    for count, row in enumerate(rows, 1):
        yield row
        tokens += len(row.ids)
        progress.advance(len(row.ids), f"{count:,} rows")
        if steps.enough(count, tokens):
            return


def _whole(row: Tensor) -> Row:
    return Row(row.numpy().astype(np.int32), np.ones(len(row), dtype=np.bool_), 0)
