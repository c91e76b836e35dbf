"""A source of which parts were cut out, seen as if it had always been so: the reader takes what is kept.

Nothing is written to see it: its configuration names the smaller sizes, every tensor is read from the original's file
and the kept rows or columns of it are handed on. Whoever reads it afterwards needs to know nothing of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmshrink.errors import InputError
from llmshrink.formats.base import Rows
from llmshrink.io.safetensors import Checkpoint, TensorInfo
from llmshrink.model.source import Source, forget_kernels
from llmshrink.model.streamed import StreamedModel


@dataclass(frozen=True)
class Taken:
    """What a tensor of the result is made of: one of the original, or a part of it."""

    key: str  # in the original
    kept: Mapping[int, Tensor] = field(default_factory=dict)  # along a dimension: which entries, int64, in order

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the result, given that of the original."""
        return tuple(len(self.kept[axis]) if axis in self.kept else size for axis, size in enumerate(whole))

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor, a copy; itself where all is kept."""
        for axis, index in self.kept.items():
            tensor = tensor.index_select(axis, index)
        return tensor


@dataclass(frozen=True)
class Surgery:
    """All that is cut out of a model.

    Attributes:
        config: config.json of the result.
        tensors: Every tensor of the result by its name on disk.
        blocks: For each block of the result its number in the original.
        channels: Of the states between blocks that are kept, int64; None: all.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Taken]
    blocks: tuple[int, ...]
    channels: Tensor | None = None


@dataclass(frozen=True)
class Cut(Source):
    """The same model, smaller."""

    whole: Source
    surgery: Surgery

    @classmethod
    def of(cls, whole: Source, surgery: Surgery) -> Cut:
        """What a surgery makes of a source."""
        return cls(whole.id, whole.folder, whole.commit, whole, surgery)

    @cached_property
    def config_dict(self) -> dict[str, Any]:
        """The configuration with the smaller sizes."""
        return self.surgery.config

    @cached_property
    def config(self) -> PretrainedConfig:
        """The same, as transformers understands it."""
        try:
            return reconfigured(self.whole.config, self.surgery.config)
        except Exception as error:  # noqa: BLE001 - constructors of 400 families, given other numbers
            reason = str(error).strip().rpartition("\n")[2].strip()
            raise InputError(f"its configuration does not take the smaller sizes ({reason})") from error

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The weights, mapped; parts of tensors are copied when they are asked for."""
        whole = self.whole.checkpoint
        assert isinstance(whole, Checkpoint)
        return _Parts(whole, self.surgery.tensors)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Those of the files that it is read from."""
        return self.whole.hashes


@dataclass(frozen=True)
class Original:
    """The model that another was cut out of, and how."""

    model: StreamedModel
    surgery: Surgery

    @property
    def blocks(self) -> tuple[int, ...]:
        """For each block of the other its number here."""
        return self.surgery.blocks

    def stretch(self, index: int) -> range:
        """The blocks here that one block of the other stands for: those behind it that are gone, too."""
        end = len(self.model.anatomy.blocks) if index + 1 == len(self.blocks) else self.blocks[index + 1]
        return range(self.blocks[index], end)

    def seen(self, state: Tensor) -> Tensor:
        """A state as the other has it."""
        channels = self.surgery.channels
        return state if channels is None else state.index_select(-1, channels.to(state.device))

    def stored_bytes(self, key: str) -> int:
        """Bytes on disk of what a tensor of the other was taken from."""
        return self.model.weights.stored_bytes(self.surgery.tensors[key].key)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape, on disk, of what a tensor of the other was taken from."""
        return self.model.weights.infos[self.surgery.tensors[key].key].shape


class _Parts(Checkpoint):
    """Parts of a checkpoint's tensors, under names of their own."""

    def __init__(self, whole: Checkpoint, tensors: Mapping[str, Taken]) -> None:
        def info(taken: Taken) -> TensorInfo:
            found = whole.infos[taken.key]
            return TensorInfo(found.file, found.dtype, taken.shape(found.shape))

        super().__init__(whole.folder, {name: info(taken) for name, taken in tensors.items()})
        self._whole, self._tensors = whole, tensors

    def get(self, name: str) -> Tensor:
        """One tensor by its name in the result."""
        taken = self._tensors[name]
        return taken.of(self._whole.get(taken.key))

    def copied(self, name: str) -> bool:
        """Whether it is some columns of a matrix."""
        taken = self._tensors[name]
        return bool(taken.kept) and 0 not in taken.kept

    def rows(self, name: str) -> Callable[[Rows], Tensor]:
        """What gives rows of a matrix: of a large one, of which columns are gone, never all at once."""
        taken = self._tensors[name]
        if not self.copied(name):
            return super().rows(name)
        weight = self._whole.get(taken.key)
        return lambda rows: taken.of(weight[rows])


def reconfigured(config: PretrainedConfig, data: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a class from other values.

    Raises:
        Exception: whatever the class raises for sizes that do not go together.
    """
    made: PretrainedConfig = type(config).from_dict(dict(data))
    forget_kernels(made)
    return made


def stretches(units: tuple[int, ...], total: int, kept: Tensor) -> Tensor:
    """Where the entries of kept things lie along a dimension.

    Args:
        units: entries of each thing, for each stretch of the dimension that holds all of them one after another.
        total: how many things there are.
        kept: those that are, int64, in order.
    """
    parts, start = [], 0
    for unit in units:
        parts.append((start + kept[:, None] * unit + torch.arange(unit)).flatten())
        start += total * unit
    return torch.cat(parts)
