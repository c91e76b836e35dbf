"""The GGUF container: headers checked before use, tensors mapped rather than read, files written durably.

Layout (version 3, little endian): the magic `GGUF`, the version, the numbers of tensors and of metadata entries; the
entries (key, kind, value); of each tensor its name, its sizes (fastest first), its type and its offset; then, each
begun at a multiple of the alignment, the tensors' bytes. A row of a quantized tensor is a whole number of blocks. A
file's size follows from its metadata and its tensors' names, types and shapes alone: `file_size` is what the plan
promises and what the writer writes.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.errors import InputError
from llmshrink.io.files import atomic_file
from llmshrink.io.ggml import TYPES, Entry

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MAX_HEADER = 200_000_000  # bytes; the largest vocabularies, with their merges, take about 20 million
MAX_TENSORS = 500_000
MAX_ENTRIES = 100_000
MAX_KEY = 65_535
MAX_NAME = 63  # bytes of a tensor's name: ggml keeps 64 with the zero at the end
MAX_RANK = 4
MAX_NUMBER = 1 << 53


_BY_CODE = {kind.code: name for name, kind in TYPES.items()}
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # kind of a metadata value -> struct's letter
_STRING, _ARRAY = 8, 9
_KINDS = {letter: kind for kind, letter in _NUMBERS.items()}

Value = bool | int | float | str | list[int] | list[float] | list[str]
"""What can be written: int as uint32, float as float32; in lists int as int32."""


@dataclass(frozen=True)
class Array:
    """A list in the metadata, left in the file until it is asked for: Python would need many times its bytes."""

    count: int
    letter: str  # of struct, or "" for texts
    raw: memoryview = field(repr=False)

    def values(self) -> list[Any]:
        """Its elements.

        Raises:
            ValueError: a text is not UTF-8.
        """
        if self.letter:
            return list(struct.unpack(f"<{self.count}{self.letter}", self.raw))
        reader = _Reader(self.raw)
        return [reader.text() for _ in range(self.count)]


class _Reader:
    """Takes values from the front of bytes that a stranger wrote; ValueError where they are not there."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError("it ends within its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))
        return value

    def count(self, what: str, limit: int) -> int:
        found: int = self.number("Q")
        if found > limit:
            raise ValueError(f"it has {found:,} {what}")
        return found

    def text(self, limit: int = MAX_HEADER) -> str:
        return str(self.take(self.count("bytes in a text", limit)), "utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        return self.number(_letter(kind))

    def array(self) -> Array:
        kind, start = self.number("I"), self.at + 8
        count = self.count("elements in a list", MAX_HEADER)
        if kind != _STRING:
            letter = _letter(kind)
            return Array(count, letter, self.take(count * struct.calcsize(f"<{letter}")))
        for _ in range(count):
            self.take(self.count("bytes in a text", MAX_HEADER))
        return Array(count, "", self.data[start : self.at])

    def entry(self) -> tuple[Entry, int]:
        name, rank = self.text(MAX_NAME), self.number("I")
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"tensor {name!r} has {rank} dimensions")
        sizes = [self.number("Q") for _ in range(rank)]
        code, offset = self.number("I"), self.number("Q")
        if code not in _BY_CODE:
            raise ValueError(f"tensor {name!r} has the unknown type {code}")
        entry = Entry(name, _BY_CODE[code], tuple(reversed(sizes)))
        if min(sizes) < 1 or math.prod(sizes) > MAX_NUMBER or sizes[0] % TYPES[entry.type].values:
            raise ValueError(f"no {entry.type} tensor has the shape {list(entry.shape)}, which {name!r} has")
        return entry, offset


def _letter(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"its metadata has a value of the unknown kind {kind}")
    return _NUMBERS[kind]


@dataclass(frozen=True)
class GgufFile:
    """A file whose header was read and found sound; its tensors are mapped."""

    path: Path
    metadata: dict[str, bool | int | float | str | Array]
    entries: dict[str, Entry]
    _starts: dict[str, int] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read a header, with the file's length checked against it.

        Raises:
            InputError: the file is truncated, is not GGUF of this version, or its tensors overlap or leave holes.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise InputError(f"{path} is a Git LFS pointer, not weights.", hint="Fetch it with `git lfs pull`.")
            if start[:4] != MAGIC:
                raise InputError(f"{path} is not a GGUF file.")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            reader = _Reader(data[:MAX_HEADER])
            metadata, tensors = _header_of(reader)
            alignment = _alignment(metadata)
            starts = _starts_of(tensors, _padded(reader.at, alignment), alignment, size)
        except ValueError as error:
            raise InputError(
                f"{path} is truncated or damaged: {error}. Download it again, or restore it from its source."
            ) from error
        return cls(path, metadata, {entry.name: entry for entry, _ in tensors}, starts)

    @cached_property
    def _data(self) -> Tensor:
        return torch.from_file(str(self.path), shared=False, size=self.path.stat().st_size, dtype=torch.uint8)

    def get(self, name: str) -> Tensor:
        """One tensor as stored, mapped from the file: do not write to it. See `Entry.dtype` and `Entry.stored`."""
        entry, start = self.entries[name], self._starts[name]
        return self._data[start : start + entry.bytes].view(entry.dtype).view(entry.stored)


def _header_of(reader: _Reader) -> tuple[dict[str, Any], list[tuple[Entry, int]]]:
    reader.take(len(MAGIC))
    if (version := reader.number("I")) != VERSION:
        raise ValueError(f"it has version {version}, and {VERSION} can be read")
    tensors, entries = reader.count("tensors", MAX_TENSORS), reader.count("metadata entries", MAX_ENTRIES)
    metadata = dict(_unique((reader.text(MAX_KEY), reader.value()) for _ in range(entries)))
    found = dict(_unique((entry.name, (entry, at)) for entry, at in (reader.entry() for _ in range(tensors))))
    return metadata, list(found.values())


def _unique(pairs: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    seen = set()
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"{name[:100]!r} is there twice")
        seen.add(name)
        yield name, value


def _alignment(metadata: Mapping[str, Any]) -> int:
    found = metadata.get("general.alignment", ALIGNMENT)
    if type(found) is not int or found not in (1 << n for n in range(3, 17)):
        raise ValueError(f"its alignment is {str(found)[:100]}")
    return found


def _starts_of(tensors: list[tuple[Entry, int]], first: int, alignment: int, size: int) -> dict[str, int]:
    """Where each tensor begins in the file; they must follow one another and fill it."""
    position, end = 0, first
    for entry, offset in sorted(tensors, key=lambda pair: pair[1]):
        if offset != position:
            raise ValueError(f"tensor {entry.name!r} does not lie where the one before it ends")
        end = first + position + entry.bytes
        position = _padded(position + entry.bytes, alignment)
    if not end <= size <= first + position:
        raise ValueError(f"its header describes {end} bytes and the file has {size}")
    return {entry.name: first + offset for entry, offset in tensors}


def _padded(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """Kind and bytes of a metadata value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        if isinstance(value[0], str):
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
        letter = "f" if isinstance(value[0], float) else "i"
        return struct.pack(f"<IIQ{len(value)}{letter}", _ARRAY, _KINDS[letter], len(value), *value)
    letter = "?" if isinstance(value, bool) else "f" if isinstance(value, float) else "I"
    return struct.pack(f"<I{letter}", _KINDS[letter], value)


def _header(metadata: Mapping[str, Value], entries: Sequence[Entry]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(metadata))]
    parts += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for entry in entries:
        rank = len(entry.shape)
        sizes = struct.pack(f"<I{rank}Q", rank, *reversed(entry.shape))
        parts += [_text(entry.name), sizes, struct.pack("<IQ", TYPES[entry.type].code, offset)]
        offset += _padded(entry.bytes)
    raw = b"".join(parts)
    return raw.ljust(_padded(len(raw)), b"\0")


def file_size(metadata: Mapping[str, Value], entries: Sequence[Entry]) -> int:
    """Size in bytes of the file that `write` makes of these; it needs no data."""
    return len(_header(metadata, entries)) + sum(_padded(entry.bytes) for entry in entries)


def write(path: Path, metadata: Mapping[str, Value], entries: Sequence[Entry], get: Callable[[str], Tensor]) -> str:
    """Write a file; one tensor at a time passes through memory.

    Args:
        path: of the file; it appears complete or not at all.
        metadata: in the order to be written; no list is empty.
        entries: the tensors, in the order to be written.
        get: the data of a tensor by its name: of its entry's `dtype` and shape `stored`.

    Returns:
        The file's SHA-256.
    """
    with atomic_file(path) as file:
        file.write(_header(metadata, entries))
        for entry in entries:
            tensor = get(entry.name)
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.stored), entry.name
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            file.write(memoryview(flat.numpy().data))
            file.write(bytes(_padded(entry.bytes) - entry.bytes))
    return file.sha256
