"""A folder's weights as plain matrices, whether they are stored dense or compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmshrink.errors import InputError, PlanError
from llmshrink.formats import format_of
from llmshrink.formats.base import Kind, Rows, Slot
from llmshrink.forms import Form, InputScheme, check_blocks, decode
from llmshrink.gguf.checkpoint import GgufCheckpoint
from llmshrink.io.safetensors import Checkpoint, TensorInfo
from llmshrink.memory import memory_error
from llmshrink.model.edits import Edit, changed


class Weights:
    """The dense view of a checkpoint: names, shapes and dtypes as if nothing were compressed, and as it was changed.

    Attributes:
        infos: Every tensor by its name, as it would be if nothing were compressed.
        compressed: Names of those that are.
        edits: Changes of tensors, by name, in the order in which they are made.
        exact: Names of those that are not rounded to the model's dtype when they are changed, as they are not written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | GgufCheckpoint,
        quantization: dict[str, Any] | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`quantization` is the `quantization_config`; `dtype` the model's: what a compressed matrix is when dense."""
        self._checkpoint, self._config = checkpoint, quantization
        found = format_of(quantization)
        if found is None:
            method = (quantization or {}).get("quant_method")
            raise PlanError(f"{checkpoint.folder} is quantized by {method!r}, which llmshrink cannot read back yet.")
        with self._reading("its settings"):
            why = found.cannot_read(quantization)
        if why:
            raise PlanError(f"{checkpoint.folder} is stored as {found.name}, of which {why}.")
        self.format = found
        compressed = found.dense_names(checkpoint.infos)
        if quantization is not None and not compressed:
            raise PlanError(
                f"{checkpoint.folder} is stored as {found.name}, its settings say, but none of its tensors are.",
                hint="If the weights are dense, take the settings out of config.json (or delete quantize_config.json).",
            )
        self._parts = {key: found.companions(key, checkpoint.infos) for key in compressed}
        hidden = {name for names in self._parts.values() for name in names}
        self.infos = {name: info for name, info in checkpoint.infos.items() if name not in hidden}
        for key, names in self._parts.items():
            with self._reading(key):
                shape, own = found.dense_info(key, checkpoint.get, quantization)
                if len(shape) != 2 or min(shape) < 1 or not isinstance(own, torch.dtype):
                    raise ValueError(f"it is said to have the shape {list(shape)} and the dtype {own}")
            self.infos[key] = TensorInfo(checkpoint.infos[names[0]].file, dtype or own, shape)
        self.compressed = frozenset(compressed)
        self.edits: dict[str, list[Edit]] = {}
        self.exact: frozenset[str] = frozenset()
        self._modules: Mapping[str, str] = {}
        self._transposed: frozenset[str] = frozenset()

    def place(self, modules: Mapping[str, str], transposed: Iterable[str]) -> None:
        """Say where matrices go in memory.

        Args:
            modules: key on disk -> name of the module that holds it, by which settings may name it.
            transposed: keys of matrices that are [in, out] when dense (Conv1D): the stored form is always [out, in].
        """
        self._modules = modules
        self._transposed = frozenset(transposed) & self.compressed
        for key in self._transposed:
            self.infos[key] = replace(self.infos[key], shape=self.infos[key].shape[::-1])

    def change(self, edits: Iterable[Edit]) -> None:
        """From now on, make these changes too whenever a tensor is read."""
        for edit in edits:
            self.edits.setdefault(edit.place.key, []).append(edit)

    def stored_bytes(self, key: str) -> int:
        """Bytes on disk of all tensors that together store `key`."""
        return sum(self._checkpoint.infos[name].bytes for name in self._parts.get(key, [key]))

    def form(self, key: str) -> Form:
        """The stored form of a compressed matrix, seen as [out, in]."""
        with self._reading(key):
            form = self.format.unpack(self._slot(key), self._checkpoint.get, self._config)
            check_blocks(form)
        return form

    def rows(self, key: str) -> Callable[[Rows], Tensor]:
        """What gives rows of a matrix: as stored, or decoded to float32 where it is compressed; changed along a row."""
        stored = self._rows(key)
        return stored if key not in self.edits else lambda rows: self._edited(key, stored(rows))

    def _rows(self, key: str) -> Callable[[Rows], Tensor]:
        if key not in self.compressed:
            return self._checkpoint.rows(key)
        with self._reading(key):
            return self.format.reader(self._slot(key), self._checkpoint.get, self._config)

    def copied(self, key: str) -> bool:
        """Whether a tensor as a whole would be a copy, where rows of it need not be: parts of larger ones."""
        mapped = self._checkpoint
        return key not in self.edits and isinstance(mapped, Checkpoint) and mapped.copied(key)

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of any matrix are rounded."""
        return any(self.input(key) is not None for key in self.compressed)

    def input(self, key: str) -> InputScheme | None:
        """How the inputs of a matrix are rounded; None: they are not."""
        if key not in self.compressed:
            return None
        with self._reading(key):
            return self.format.unpack_input(self._slot(key), self._checkpoint.get, self._config)

    def input_as_read(self, key: str, kind: Kind) -> InputScheme | None:
        """How transformers rounds the inputs of a compressed matrix; None: it does not, whatever the settings say."""
        return self.input(key) if self.format.rounds_inputs(kind, self._config) else None

    def _slot(self, key: str) -> Slot:
        info, flipped = self.infos[key], key in self._transposed
        rows, cols = info.shape[::-1] if flipped else info.shape
        module = self._modules.get(key, key.removesuffix(".weight"))
        return Slot(key, module, (rows, cols), info.dtype, "conv1d" if flipped else "linear")

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Say which folder is at fault where settings and tensors, both of strangers, do not fit each other."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if memory_error(error):
                raise
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{self._checkpoint.folder}: {what} cannot be read with the settings it has ({reason}).",
                hint="The folder is incomplete, or its quantization_config was written for another one.",
            ) from error

    def as_read(self, key: str, kind: Kind) -> Tensor:
        """A compressed matrix as transformers computes with it in float32: some are rounded while they are loaded."""
        weight = self.get(key)
        return weight.to(self.infos[key].dtype).float() if self.format.rounds(kind, self._config) else weight

    def get(self, key: str) -> Tensor:
        """A tensor as stored, or decoded to float32 where it is compressed, with its changes."""
        return self._edited(key, self.unchanged(key))

    def unchanged(self, key: str) -> Tensor:
        """The same without its changes."""
        if key not in self.compressed:
            return self._checkpoint.get(key)
        with self._reading(key):
            weight = decode(self.form(key))
        return weight.T if key in self._transposed else weight

    def _edited(self, key: str, tensor: Tensor) -> Tensor:
        if key not in self.edits:
            return tensor
        own = self.infos[key].dtype
        return changed(tensor, self.edits[key], torch.promote_types(own, torch.float32) if key in self.exact else own)

    def dense(self, key: str) -> Tensor:
        """A tensor as it is stored where nothing is compressed: decoded matrices in the model's dtype."""
        return self.get(key).to(self.infos[key].dtype)
