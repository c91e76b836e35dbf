"""A folder's weights as plain matrices, whether they are stored dense or compressed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from llmshrink.errors import PlanError
from llmshrink.formats import format_of
from llmshrink.formats.base import Kind, Slot
from llmshrink.forms import Form, decode
from llmshrink.io.safetensors import Checkpoint, TensorInfo


class Weights:
    """The dense view of a checkpoint: names, shapes and dtypes as if nothing were compressed."""

    def __init__(self, checkpoint: Checkpoint, config: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._config: dict[str, Any] | None = config.get("quantization_config")
        found = format_of(config)
        if found is None:
            method = (self._config or {}).get("quant_method")
            raise PlanError(f"{checkpoint.folder} is quantized by {method!r}, which llmshrink cannot read back yet.")
        if why := found.cannot_read(self._config):
            raise PlanError(f"{checkpoint.folder} is stored as {found.name}, of which {why}.")
        self.format = found
        compressed = found.dense_names(checkpoint.infos)
        parts = {key: found.companions(key, checkpoint.infos) for key in compressed}
        hidden = {name for names in parts.values() for name in names}
        self.infos = {name: info for name, info in checkpoint.infos.items() if name not in hidden}
        for key, names in parts.items():
            shape, dtype = found.dense_info(key, checkpoint.get, self._config)
            self.infos[key] = TensorInfo(checkpoint.infos[names[0]].file, dtype, shape)
        self.compressed = frozenset(compressed)
        self._transposed: frozenset[str] = frozenset()

    def transpose(self, keys: Iterable[str]) -> None:
        """Say which compressed matrices are [in, out] when dense (Conv1D): the stored form is always [out, in]."""
        self._transposed = frozenset(keys) & self.compressed
        for key in self._transposed:
            self.infos[key] = replace(self.infos[key], shape=self.infos[key].shape[::-1])

    def form(self, key: str) -> Form:
        """The stored form of a compressed matrix, seen as [out, in]."""
        info, flipped = self.infos[key], key in self._transposed
        rows, cols = info.shape[::-1] if flipped else info.shape
        slot = Slot(key, key.removesuffix(".weight"), (rows, cols), info.dtype, "conv1d" if flipped else "linear")
        return self.format.unpack(slot, self._checkpoint.get, self._config)

    def as_read(self, key: str, kind: Kind) -> Tensor:
        """A compressed matrix as transformers computes with it in float32: some are rounded while they are loaded."""
        weight = self.get(key)
        return weight.to(self.infos[key].dtype).float() if self.format.rounds(kind, self._config) else weight

    def get(self, key: str) -> Tensor:
        """A tensor as stored, or decoded to float32 where it is compressed."""
        if key not in self.compressed:
            return self._checkpoint.get(key)
        weight = decode(self.form(key))
        return weight.T if key in self._transposed else weight
