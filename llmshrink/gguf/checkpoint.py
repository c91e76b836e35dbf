"""A folder with a GGUF file, seen as the checkpoint that it was made from.

Names, dtypes and shapes are those of the shards (see `blueprint.draw`), but for vectors and position embeddings: they
are float32, as the file has them, whatever they were. A Gemma norm is the file's sum less 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from llmshrink.block_types import BLOCK_TYPES
from llmshrink.errors import InputError
from llmshrink.gguf.blueprint import CAST, PREFIX
from llmshrink.gguf.names import Change, Family, family_read
from llmshrink.io.ggml import DTYPES, Entry
from llmshrink.io.gguf import Array, GgufFile
from llmshrink.io.safetensors import TensorInfo, refuse_outside

SINGLE = "model.gguf"


class GgufCheckpoint:
    """The tensors of a model folder, by the names of the checkpoint; mapped, so they cost nothing until used."""

    def __init__(self, folder: Path, file: GgufFile) -> None:
        self.folder = folder
        self._file = file
        family, heads = self._family(), self._heads()
        cast = set(self._texts(CAST))
        own = file.metadata.get(PREFIX, family.prefix)
        self._found: dict[str, tuple[str, Change]] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.norms_add = family.norms_add  # to what the checkpoint had
        for name, entry in file.entries.items():
            key = family.key(name)
            if key is None and name.startswith("rope_"):
                continue  # what llama.cpp has computed before: divisors of frequencies
            if key is None:
                raise InputError(f"{file.path}: llmshrink knows no tensor {name!r} of {family.architecture}.")
            if entry.type not in DTYPES and entry.type not in BLOCK_TYPES:
                known = ", ".join(BLOCK_TYPES)
                raise InputError(f"{file.path}: {name} is of the type {entry.type}, which is not read; known: {known}.")
            if key.startswith(family.prefix):
                key = f"{own}{key.removeprefix(family.prefix)}"
            packed = entry.type not in DTYPES or name in cast
            change = family.change(name, heads, packed=packed)
            self._refuse_shape(entry, change)
            shape = entry.stored[::-1] if change.transpose else entry.stored
            key = f"{key}.{entry.type}" if packed else key
            self._found[key] = name, change
            self.infos[key] = TensorInfo(file.path.name, entry.dtype, shape)

    @classmethod
    def open(cls, folder: Path) -> GgufCheckpoint:
        """Read the header of a folder's `model.gguf`.

        Raises:
            InputError: the file is damaged, or llmshrink has no names for its architecture.
            UnsafeError: it is a link out of the folder.
        """
        path = folder / SINGLE
        refuse_outside(path)
        return cls(folder, GgufFile.open(path))

    def get(self, name: str) -> Tensor:
        """One tensor, mapped from the file where nothing was changed on the way: do not write to it."""
        found, change = self._found[name]
        return change.back(self._file.get(found))

    def rows(self, name: str) -> Callable[[Tensor | slice], Tensor]:
        """What gives rows of a tensor."""
        weight = self.get(name)
        return lambda rows: weight[rows]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self._file.entries.values())

    @property
    def files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return [self._file.path.name]

    @property
    def file_bytes(self) -> int:
        """Bytes of these files, headers counted."""
        return self._file.path.stat().st_size

    def _family(self) -> Family:
        architecture = self._file.metadata.get("general.architecture")
        family = family_read(architecture)
        if family is None:
            raise InputError(
                f"{self._file.path} is of the architecture {str(architecture)[:100]!r}: it cannot be read."
            )
        return family

    def _heads(self) -> tuple[int, int]:
        names = [f"{self._family().architecture}.attention.head_count{of}" for of in ("", "_kv")]
        queries, keys = (self._file.metadata.get(name) for name in names)
        if type(queries) is not int or type(keys) is not int or queries < 1 or keys < 1:
            raise InputError(f"{self._file.path} does not say how many heads it has ({names[0]}).")
        return queries, keys

    def _texts(self, name: str) -> list[str]:
        found = self._file.metadata.get(name)
        try:
            return [str(text) for text in found.values()] if isinstance(found, Array) else []
        except ValueError as error:
            raise InputError(f"{self._file.path}: {name} is no list of texts ({error}).") from error

    def _refuse_shape(self, entry: Entry, change: Change) -> None:
        """Refuse what could not be turned back into the checkpoint's tensor."""
        whole = change.heads == 0 or entry.shape[0] % (2 * change.heads) == 0
        if len(entry.shape) > 2 or (change.transpose and len(entry.shape) != 2) or not whole:
            raise InputError(f"{self._file.path}: no {entry.name} has the shape {list(entry.shape)}.")
