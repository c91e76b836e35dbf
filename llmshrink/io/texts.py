"""Which names of a text are files."""

from __future__ import annotations

from pathlib import Path

from llmshrink.errors import InputError

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
PATHS = ("/", "./", "../", "~")  # what no dataset's id begins with


def text_file(data: str) -> Path | None:
    """The file that a name means; None: a dataset on the Hub, which is not looked up.

    Raises:
        InputError: there is no such file, or none that can be read.
    """
    path = Path(data).expanduser()
    if path.is_file() and path.suffix in SUFFIXES:
        return path
    if path.exists():
        raise InputError(f"{data!r} is not a text file I can read; known endings: {', '.join(SUFFIXES)}.")
    if path.suffix in SUFFIXES or data.startswith(PATHS):
        raise InputError(f"There is no text file {data!r}.")
    return None
