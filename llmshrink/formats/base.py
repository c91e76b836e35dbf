"""The contract of a checkpoint format.

`pack` runs on `meta` too, so the plan knows every byte before a weight is read. `unpack` reads what `pack` wrote, and
the engine goes on with what `unpack` gives: the error it measures is the error of the file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llmshrink.forms import Form, InputKind, InputScheme, Layer, decode

Rows = Tensor | slice  # of a matrix: their numbers, int64, or a stretch

# What holds a matrix in memory: nn.Linear, a subclass of it with its own forward, Conv1D, or experts fused into one
# parameter, of which each is a matrix of its own on disk. Outside the blocks: the table of tokens, the output's linear.
Kind = Literal["linear", "subclass", "conv1d", "experts", "embedding", "head"]


@dataclass(frozen=True)
class Slot:
    """The place of one matrix in a checkpoint."""

    key: str  # name on disk of the dense weight, e.g. model.layers.0.mlp.up_proj.weight
    module: str  # module name as loaders match it
    shape: tuple[int, int]  # [out, in]
    dtype: torch.dtype  # of the dense weight on disk
    kind: Kind = "linear"

    @property
    def transposed(self) -> bool:
        """Whether the dense weight is on disk as [in, out]."""
        return self.kind == "conv1d"

    @property
    def name(self) -> str:
        """The key without `.weight`."""
        return self.key.removesuffix(".weight")


class Format(ABC):
    """How compressed matrices are stored, and how a loader is told."""

    name: ClassVar[str]
    quant_method: ClassVar[str | None]  # of `quantization_config`, by which loaders choose
    parts: ClassVar[tuple[str, ...]] = ()  # what follows a layer's name in the tensors that store its weight
    marks: ClassVar[tuple[str, ...]] = ()  # those of them by which a compressed matrix is known
    by_row: ClassVar[bool] = False  # a row of a matrix lies in that row of each of its tensors
    holds_sparse: ClassVar[bool] = False  # dropped weights are not stored; else zeros are
    rounded_inputs: ClassVar[tuple[InputKind, ...]] = ()  # how it can say that inputs are rounded

    @abstractmethod
    def check(self, slot: Slot, layer: Layer) -> str | None:
        """Why this format cannot hold this layer, or None. Whether a loader reads it is said by `runtimes`."""

    def check_all(self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str]) -> str | None:
        """Why this format cannot hold these layers together and leave the modules named in `left`, or None."""
        return None

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What scales are stored in where the dense weight has this dtype."""
        return dtype

    def type_of(self, layer: Layer) -> str | None:
        """The format's own name for the way a layer is stored, where it has several."""
        return None

    def rounds(self, kind: Kind, config: dict[str, Any] | None) -> bool:
        """Whether transformers decodes a matrix in the checkpoint's dtype, whatever it computes in."""
        return False

    def rounds_inputs(self, kind: Kind, config: dict[str, Any] | None) -> bool:
        """Whether transformers rounds the inputs of a matrix where the settings say that they are rounded."""
        return False

    def files(self, config: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
        """JSON files that belong beside config.json, by name; `config` is the `quantization_config`."""
        return {}

    @abstractmethod
    def pack(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """The tensors to write, by their names on disk."""

    def borrowed(self, slot: Slot, layer: Layer) -> dict[str, Tensor]:
        """What this matrix needs of the tensors that are stored beside another."""
        return {}

    @abstractmethod
    def unpack(self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None) -> Form:
        """The form behind the tensors that `get` returns by name; `config` is the `quantization_config`."""

    def reader(
        self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> Callable[[Rows], Tensor]:
        """What decodes rows of a matrix to float32: all at once where they are not stored by themselves."""
        if not self.by_row:
            weight = decode(self.unpack(slot, get, config))
            return lambda rows: weight[rows]

        def read(rows: Rows) -> Tensor:
            picked = range(slot.shape[0])[rows] if isinstance(rows, slice) else rows
            part = replace(slot, shape=(len(picked), slot.shape[1]))
            # A copy: what is computed with must not lie in a mapped file.
            return decode(self.unpack(part, lambda name: get(name)[rows].clone(), config))

        return read

    def unpack_input(
        self, slot: Slot, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> InputScheme | None:
        """How the inputs of this matrix are rounded, or None: they are not."""
        return None

    def config(
        self, layers: Iterable[tuple[Slot, Layer]], left: Iterable[str], dtype: torch.dtype
    ) -> dict[str, Any] | None:
        """The `quantization_config`: `layers` are stored compressed, modules named in `left` are not; None: no word."""
        return None

    def other_config(self, config: dict[str, Any] | None) -> dict[str, Any] | None:
        """A `quantization_config` with which the same files load by another way, or None."""
        return None

    def owns(self, config: dict[str, Any]) -> bool:
        """Whether a `quantization_config` is of this format."""
        return self.quant_method is not None and self.quant_method == config.get("quant_method")

    def cannot_read(self, config: dict[str, Any] | None) -> str | None:
        """Why a checkpoint with this `quantization_config`, written by any tool, cannot be decoded here, or None."""
        return None

    def dense_names(self, stored: Iterable[str]) -> dict[str, str]:
        """For each matrix among the stored tensor names: its dense key -> the tensor that marks it as compressed."""
        return {n.removesuffix(mark) + ".weight": n for n in stored for mark in self.marks if n.endswith(mark)}

    def companions(self, key: str, stored: Container[str]) -> list[str]:
        """Names of all tensors that together store the matrix `key`."""
        name = key.removesuffix(".weight")
        return [name + part for part in self.parts if name + part in stored]

    @abstractmethod
    def dense_info(
        self, key: str, get: Callable[[str], Tensor], config: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape [out, in] and dtype of a compressed matrix once it is decoded."""
