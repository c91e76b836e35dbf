"""A whole GGUF file, described before there is data: its size is exact, and it is written one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from gguf import GGML_QUANT_VERSION, LlamaFileType
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmshrink.errors import PlanError
from llmshrink.gguf.metadata import describe
from llmshrink.gguf.names import BUFFERS, EMBEDDING, HEAD, POSITIONS, Change, Family, family_of
from llmshrink.gguf.vocabulary import vocabulary
from llmshrink.io import gguf as container
from llmshrink.io.ggml import DTYPES, TYPES, Entry
from llmshrink.io.gguf import Value

PREFIX = "llmshrink.prefix"  # of the checkpoint's keys, where it is not the family's own
CAST = "llmshrink.cast"  # names of the unquantized matrices that were nevertheless treated: `K.F16` and the like
_TYPE_OF = {DTYPES[name]: name for name in ("F32", "F16", "BF16")}


class Described(Protocol):
    """A tensor, on `meta` too, or what a header says of one."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""


@dataclass(frozen=True)
class Part:
    """One tensor of the file, and the tensor of the checkpoint that it comes from."""

    entry: Entry
    key: str
    change: Change

    def take(self, get: Callable[[str], Tensor]) -> Tensor:
        """Its data as the file stores it."""
        found = get(self.key)
        if self.entry.type == "F32":
            found = found.float()
        return self.change.forward(found)


@dataclass(frozen=True)
class Blueprint:
    """Everything of a file but the data."""

    metadata: dict[str, Value]
    parts: tuple[Part, ...]
    computed: dict[str, Tensor]  # small float32 tensors that no checkpoint has
    notes: tuple[str, ...]  # in what llama.cpp differs from the model: for the user

    @property
    def entries(self) -> list[Entry]:
        """The tensors of the file in its order."""
        own = [Entry(name, "F32", tuple(tensor.shape)) for name, tensor in self.computed.items()]
        return sorted([*own, *(part.entry for part in self.parts)], key=lambda entry: entry.name)

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return container.file_size(self.metadata, self.entries)

    def write(self, path: Path, get: Callable[[str], Tensor]) -> str:
        """Write the file, one tensor at a time.

        Args:
            path: of the file; it appears complete or not at all.
            get: a tensor of the checkpoint by its key, of the dtype and shape that `draw` was told.

        Returns:
            The file's SHA-256.
        """
        parts = {part.entry.name: part for part in self.parts}

        def data(name: str) -> Tensor:
            return self.computed[name] if name in self.computed else parts[name].take(get)

        return container.write(path, self.metadata, self.entries, data)


def draw(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Mapping[str, Described],
    *,
    type: str | None,
    name: str,
    licence: str | None = None,
) -> Blueprint:
    """Plan the file of a model.

    Args:
        config: of the model, as transformers understands it.
        tokenizer: of the model, as transformers loaded it.
        tensors: all of the checkpoint by their keys: dense ones under their own, a matrix stored as the ggml type T
            under `<key>.T`, as [out, bytes of a row] (uint8) or, for F32, F16 and BF16, as [out, in].
        type: of the whole file, e.g. Q4_K_M; None: one that has no name.
        name: of the model.
        licence: of the model.

    Raises:
        PlanError: llama.cpp cannot run this model, or would compute something else.
    """
    family = family_of(config.model_type)
    values, computed, notes = describe(config, family.architecture)
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    tied = config.tie_word_embeddings
    if not (tied or family.head):
        raise PlanError(f"llama.cpp runs {family.architecture} only with the head tied to the embedding.")
    kept = [key for key in tensors if not BUFFERS.fullmatch(key)]
    parts = [_part(family, key, tensors[key], heads) for key in kept]
    parts = [part for part in parts if not (tied and part.entry.name == f"{HEAD}.weight")]
    embedding = next((part.entry for part in parts if part.entry.name == f"{EMBEDDING}.weight"), None)
    if embedding is None:
        raise PlanError(f"The model has no embedding among its {len(tensors)} tensors.")
    words, more = vocabulary(tokenizer, config, embedding.shape[0])
    metadata: dict[str, Value] = {
        "general.architecture": family.architecture,
        "general.type": "model",
        "general.name": name,
        **({"general.license": licence} if licence else {}),
        "general.file_type": _file_type(type),
        "general.quantization_version": GGML_QUANT_VERSION,
        **values,
        **words,
    }
    if not any(key.startswith(family.prefix) for key in kept):
        metadata[PREFIX] = ""
    if cast := sorted(
        part.entry.name for part in parts if _split(part.key)[1] and part.entry.type in _TYPE_OF.values()
    ):
        metadata[CAST] = cast
    return Blueprint(metadata, tuple(parts), computed, (*notes, *more))


def _file_type(mix: str | None) -> int:
    name = {None: "GUESSED", "F32": "ALL_F32"}.get(mix, f"MOSTLY_{mix}")
    return int(LlamaFileType[name].value)


def _split(key: str) -> tuple[str, str | None]:
    """The key of a matrix and the type it is stored as: `a.weight.Q4_K` is `a.weight` as Q4_K."""
    dense, _, kind = key.rpartition(".")
    return (dense, kind) if kind in TYPES else (key, None)


def _part(family: Family, key: str, tensor: Described, heads: tuple[int, int]) -> Part:
    dense, kind = _split(key)
    name = family.name(dense)
    if name is None:
        raise PlanError(f"llama.cpp's {family.architecture} has no tensor for {dense}.")
    change = family.change(name, heads, packed=kind is not None)
    shape = tuple(tensor.shape)
    if kind is None:
        if tensor.dtype not in _TYPE_OF:
            raise PlanError(f"{key} is {tensor.dtype}, which a GGUF file of llama.cpp does not hold.")
        small = len(shape) == 1 or name == f"{POSITIONS}.weight"  # llama.cpp computes with these in float32
        kind = "F32" if small else _TYPE_OF[tensor.dtype]
        shape = shape[::-1] if change.transpose else shape
    elif kind not in DTYPES:
        shape = (shape[0], shape[1] // TYPES[kind].bytes * TYPES[kind].values)
    return Part(Entry(name, kind, shape), key, change)
