"""Whether a text that is evaluated was trained on: then the figures on it say little."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llmshrink.calibration.load import related
from llmshrink.calibration.rows import Rows
from llmshrink.forms import Event
from llmshrink.train.data import Examples

STRETCH = 50  # tokens that two texts do not share by chance (Lee et al. 2022, arXiv 2107.06499)
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the hash of a stretch: odd, its bits mixed


def overlaps(examples: Examples, texts: list[Rows]) -> list[Event]:
    """What each text has in common with what is trained on: its name, or a stretch of tokens."""
    told = examples.told
    found = (related("training", (told.data, told.split), rows, same=_shared(examples, rows)) for rows in texts)
    return [event for event in found if event is not None]


def _shared(examples: Examples, rows: Rows) -> bool:
    """Whether any of the stretches that the rows are cut into is trained on, wherever it stands there."""
    width = min(STRETCH, rows.length)
    ids = [row[: len(row) // width * width] for row in rows.tokens]
    wanted = np.unique(np.concatenate([_hashes(row.numpy().astype(np.int32), width)[::width] for row in ids]))
    return any(np.isin(_hashes(part, width), wanted).any() for part in _stretches(examples, width))


def _stretches(examples: Examples, width: int) -> Iterator[NDArray[np.int32]]:
    """The tokens of all rows, some rows at a time; what ends one part begins the next."""
    tail = np.empty(0, dtype=np.int32)
    for chunk in examples.table["ids"].chunks:
        part = np.concatenate([tail, chunk.flatten().to_numpy()])
        yield part
        tail = part[len(part) - width + 1 :]


def _hashes(ids: NDArray[np.int32], width: int) -> NDArray[np.uint64]:
    """Of each stretch of so many tokens: a polynomial of them, modulo 2^64."""
    count = len(ids) - width + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    found = np.zeros(count, dtype=np.uint64)
    for i in range(width):
        found = found * BASE + ids[i : i + count].astype(np.uint64)
    return found
