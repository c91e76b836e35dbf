"""Durable writes: a temporary file beside the target, fsync, rename, and the mode the user's umask asks for.

safetensors 0.8 writes mode 0600 and never syncs, so a power cut can leave a full-size file of zeros that loads; every
file of an output goes through here instead.

Every durable write calls `step` between its parts. With LLMSHRINK_CRASH_AT=n in the environment the process dies at the
n-th of them, as if it were killed: that is how the tests show that a run may end anywhere and still be resumed.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from llmshrink.errors import InputError, OutputError, ResourceError

CHUNK = 1 << 22
MAX_NESTING = 64  # levels of JSON
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KILLED = 137  # the exit code of a process that got SIGKILL, as a shell reports it

_steps = itertools.count(1)  # `next` is one step of the interpreter: safe in the thread that writes blocks


def step() -> None:
    """A point between two durable steps; the process ends here if LLMSHRINK_CRASH_AT names it."""
    if str(next(_steps)) == os.environ.get("LLMSHRINK_CRASH_AT"):
        os._exit(KILLED)


class HashingWriter:
    """A binary file that hashes what passes through it; `path` is what it will be."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        self._raw = raw
        self._path = path
        self._sha = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        with naming(self._path):
            self._raw.write(data)
        self._sha.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._sha.hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make errors of the file system name `path`: those of a file that is open name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def disk_faults(output: Path, needed: int) -> Iterator[None]:
    """Turn what the file system refuses while `output` is made into an error that says what to do.

    Args:
        output: the folder that is made; its disk is the one to look at where it is full.
        needed: bytes that the whole run writes there.

    Raises:
        ResourceError: the disk is full, or a quota or the largest size of a file is reached.
        OutputError: something cannot be made, written, read or removed there.
        InputError: a file elsewhere cannot be read.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        path = Path(os.fsdecode(error.filename)) if error.filename else output
        if not path.absolute().is_relative_to(output.absolute().parent):
            raise InputError(
                f"{path}: {error.strerror}.", hint="It was there when the run began: look at it."
            ) from error
        if error.errno not in NO_ROOM:
            raise OutputError(
                f"{path}: {error.strerror}.", hint="Mend that, or choose another --output; what is finished is kept."
            ) from error
        free = shutil.disk_usage(nearest(output)).free
        raise ResourceError(
            f"{path} cannot be written: {error.strerror}. The run needs {needed / 2**20:.1f} MiB for {output}, "
            f"and {free / 2**20:.1f} are free there now.",
            hint="Make room and give the same command again: what is finished is kept.",
        ) from error


def nearest(path: Path) -> Path:
    """A path, or its nearest parent that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


@contextmanager
def atomic_file(path: Path) -> Iterator[HashingWriter]:
    """Open `path` for writing so that it appears complete or not at all.

    The temporary file is created exclusively and without following links, so a prepared symlink in the folder cannot
    redirect the write.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        with naming(path):
            with os.fdopen(os.open(temporary, flags, 0o666), "wb") as raw:
                step()
                yield HashingWriter(raw, path)
                raw.flush()
                step()
                os.fsync(raw.fileno())
            step()
            temporary.replace(path)
            step()
    except BaseException:
        with suppress(OSError):  # the first error counts, and a later run removes what stays
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> str:
    """Write a small file durably; returns its SHA-256."""
    with atomic_file(path) as file:
        file.write(data)
    return file.sha256


def write_json(path: Path, value: Any) -> str:
    """Write a JSON file durably; returns its SHA-256."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def parse_json(raw: str | bytes, *, unique: bool = False) -> Any:
    """Data from the JSON of a stranger; with `unique`, no object may hold a key twice.

    Raises:
        ValueError: not JSON, or nested deeper than anything real.
    """
    try:
        data = json.loads(raw, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels") from None
    level, depth = [data], 0
    while level := [below for value in level for below in _below(value)]:
        depth += 1
        if depth > MAX_NESTING:  # who walks it later may recurse
            raise ValueError(f"nested deeper than {MAX_NESTING} levels")
    return data


def _below(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {name[:100]!r} is there twice")
    return data


def sealed(value: Any) -> bytes:
    """A line that says whether it is whole: the SHA-256 of the JSON text, a space, the JSON text; no line break."""
    text = json.dumps(value).encode()
    return hashlib.sha256(text).hexdigest().encode() + b" " + text


def unsealed(line: bytes) -> Any:
    """What `sealed` was given, or None where the line is torn or changed."""
    digest, _, text = line.partition(b" ")
    whole = digest.decode(errors="replace") == hashlib.sha256(text).hexdigest()
    return parse_json(text) if whole else None


def copy_file(source: Path, target: Path) -> str:
    """Copy the content of a file (a snapshot in the Hub's cache is a link) durably; returns its SHA-256."""
    target.parent.mkdir(exist_ok=True)
    with source.open("rb") as raw, atomic_file(target) as file:

        def read() -> bytes:
            with naming(source):
                return raw.read(CHUNK)

        for data in iter(read, b""):
            file.write(data)
    return file.sha256


def has_hash(path: Path, digest: str) -> bool:
    """Whether a file is there and has this SHA-256."""
    return path.is_file() and sha256(path) == digest


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()
