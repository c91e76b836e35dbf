"""The safetensors container: headers checked before use, tensors mapped rather than read, files written durably.

Layout: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the tensors'
bytes without gaps. The header is padded with spaces to a multiple of 8, so a file's size follows from its tensors'
names, dtypes and shapes alone: `file_size` is what the plan promises and what the writer writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmshrink.errors import InputError, UnsafeError
from llmshrink.io.files import atomic_file, parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # the format's own limit
MAX_INDEX = 100_000_000
MAX_TENSORS = 500_000  # the largest models of experts, in packed codes, have about half as many
MAX_NUMBER = 1 << 53
MAX_RANK = 16

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the data."""
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of one file, with the file's length checked against them.

    Raises:
        InputError: the file is truncated, is not a safetensors file, or its tensors overlap or leave holes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise InputError(f"{path} is a Git LFS pointer, not weights.", hint="Fetch the file with `git lfs pull`.")
        if len(start) < 8 or length > MAX_HEADER or 8 + length > size:
            raise InputError(_broken(path, f"its header claims {length} bytes and the file has {size}"))
        raw = file.read(length)
    try:
        header: dict[str, Any] = parse_json(raw, unique=True)
        header.pop("__metadata__", None)
        _refuse_many(path, header)
        spans = {name: _numbers(entry["data_offsets"]) for name, entry in header.items()}
        infos = {n: TensorInfo(path.name, DTYPES[e["dtype"]], _shape(e["shape"])) for n, e in header.items()}
    except KeyError as error:
        raise InputError(_broken(path, f"its header has an unknown or missing entry {error}")) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(_broken(path, f"its header cannot be parsed ({error})")) from error
    position = 0
    for name, span in sorted(spans.items(), key=lambda item: item[1]):
        if span != (position, position + infos[name].bytes):
            raise InputError(_broken(path, f"tensor {name!r} does not lie where its shape says"))
        position = span[1]
    if 8 + length + position != size:
        raise InputError(_broken(path, f"the header describes {8 + length + position} bytes and the file has {size}"))
    return infos


def _numbers(values: Any) -> tuple[int, ...]:
    """Sizes or offsets; true, 1.0 and -1 are numbers for torch, or worse."""
    if not (isinstance(values, list) and all(type(n) is int and 0 <= n < MAX_NUMBER for n in values)):
        raise ValueError(f"{str(values)[:100]} is not a list of whole numbers")
    return tuple(values)


def _shape(values: Any) -> tuple[int, ...]:
    shape = _numbers(values)
    if len(shape) > MAX_RANK or math.prod(n or 1 for n in shape) > MAX_NUMBER:
        raise ValueError(f"no tensor has the shape {str(values)[:100]}")
    return shape


def _refuse_many(path: Path, names: Sized) -> None:
    if len(names) > MAX_TENSORS:
        raise InputError(f"{path} names {len(names):,} tensors: no model has so many.")


def _broken(path: Path, why: str) -> str:
    return f"{path} is truncated or damaged: {why}. Download it again, or restore it from its source."


def refuse_pickles(where: str, names: Iterable[str]) -> None:
    """Raise UnsafeError where a model without safetensors has pickled weights."""
    if pickles := sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))):
        raise UnsafeError(
            f"{where} holds only pickled weights ({pickles[0]}): pickle is not read, because it can run any code.",
            hint="Convert them to safetensors first, or use a revision of the model that has safetensors.",
        )


class Checkpoint:
    """The tensors of a model folder, by their names on disk; mapped, so they cost no anonymous memory until used."""

    def __init__(self, folder: Path, infos: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.infos = infos
        self._open: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read all headers of a folder and check them against each other.

        Raises:
            InputError: no safetensors, a shard is missing or damaged, or index and shards disagree.
            UnsafeError: only pickled weights, or an index that names a file outside the folder.
        """
        if (folder / INDEX).exists():
            found = cls(folder, _read_index(folder))
            if (folder / SINGLE).exists() and SINGLE not in found.files:
                raise InputError(f"{folder} holds {SINGLE} beside the shards of {INDEX}: which one counts?")
            return found
        if (folder / SINGLE).exists():
            return cls(folder, read_header(_inside(folder, SINGLE)))
        only = [path.name for path in folder.glob("*.safetensors")]
        if len(only) == 1 and not only[0].startswith("adapter"):  # older tools name the file after its settings
            return cls(folder, read_header(_inside(folder, only[0])))
        refuse_pickles(str(folder), [p.name for p in folder.iterdir()])
        raise InputError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}.")

    def get(self, name: str) -> Tensor:
        """One tensor as stored, mapped from its file: do not write to it."""
        return self._file(self.infos[name].file).get_tensor(name)  # type: ignore[no-any-return]

    def copied(self, name: str) -> bool:
        """Whether `get` makes a copy, and `rows` none of the whole."""
        return False

    def rows(self, name: str) -> Callable[[Tensor | slice], Tensor]:
        """What gives rows of a tensor as stored."""
        weight = self.get(name)
        return lambda rows: weight[rows]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except SafetensorError as error:
                raise InputError(_broken(self.folder / name, str(error))) from error
        return self._open[name]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.infos.values())

    @property
    def files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return sorted({info.file for info in self.infos.values()})

    @property
    def file_bytes(self) -> int:
        """Bytes of these files, headers counted."""
        return sum((self.folder / name).stat().st_size for name in self.files)


def _read_index(folder: Path) -> dict[str, TensorInfo]:
    path = _inside(folder, INDEX)
    if path.stat().st_size > MAX_INDEX:
        raise InputError(f"{path} is larger than any real index ({path.stat().st_size} bytes).")
    try:
        weight_map: dict[str, Any] = parse_json(path.read_bytes(), unique=True)["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a valid index: no JSON object with a 'weight_map' ({error}).") from error
    _refuse_many(path, weight_map)
    infos: dict[str, TensorInfo] = {}
    for name in names:
        shard = _inside(folder, name)
        if not shard.exists():
            raise InputError(f"{path} names {name!r}, which is not there. Download the model again.")
        found = read_header(shard)
        if twice := sorted(infos.keys() & found.keys()):
            raise InputError(f"Tensor {twice[0]!r} is in {name!r} and in {infos[twice[0]].file!r}: which one counts?")
        infos |= found
    wrong = sorted(key for key, file in weight_map.items() if key not in infos or infos[key].file != file)
    if wrong:
        raise InputError(f"{path} says tensor {wrong[0]!r} is in {weight_map[wrong[0]]!r}, which does not hold it.")
    return infos


def _inside(folder: Path, name: str) -> Path:
    """The path of a file named by a stranger, which must lie in the folder and be a safetensors or index file."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", ":", "\0"}
    if not plain or not name.endswith((".safetensors", ".json")):
        raise UnsafeError(f"{folder / INDEX} names the file {name!r}, which is not a file of this folder.")
    path = folder / name
    refuse_outside(path)
    return path


def refuse_outside(path: Path) -> None:
    """Raise UnsafeError where a file of a model folder is a link to somewhere else, or would block who opens it."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UnsafeError(f"{path} is neither a file nor a folder.")
    if leads_outside(path):
        raise UnsafeError(f"{path} is a link out of the model's folder ({path.resolve()}).")


def leads_outside(path: Path) -> bool:
    """Whether a path is a link out of its folder, and not one of the Hub's cache.

    Those are <repository>/snapshots/<commit>/file -> <repository>/blobs/<hash>; that blob may be a link in turn, to the
    blobs/ that all repositories of the cache share.
    """
    target, folder = path.resolve(), path.parent.resolve()
    return path.is_symlink() and not (
        target.is_relative_to(folder)
        or any(
            parent.name == "snapshots"
            and any(target.is_relative_to(root / "blobs") for root in (parent.parent, parent.parent.parent))
            for parent in folder.parents
        )
    )


def _header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Size in bytes of the file that `write` makes of these tensors; they may lie on `meta`."""
    header = _header((n, t.dtype, tuple(t.shape)) for n, t in sorted(tensors.items()))
    return 8 + len(header) + sum(t.numel() * t.dtype.itemsize for t in tensors.values())


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors, sorted by name, to a safetensors file; one tensor at a time passes through memory.

    Returns:
        The file's SHA-256.
    """
    ordered = sorted(tensors.items())
    header = _header((n, t.dtype, tuple(t.shape)) for n, t in ordered)
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            file.write(memoryview(flat.numpy().data))
    return file.sha256
