"""Changes of tensors, made whenever they are read: what a transform does to a checkpoint that nobody writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STRETCH = 1 << 17  # elements that are changed at a time, in float64: they stay in the processor's cache


@dataclass(frozen=True)
class Place:
    """Channels along one dimension of a tensor on disk."""

    key: str
    axis: int
    channels: tuple[int, ...] | None = None  # which entries of the dimension, in the channels' order; None: all
    offset: float = 0.0  # what the model adds to the tensor: a norm that multiplies by 1 + w

    def edit(self, change: Callable[[Tensor], Tensor]) -> Edit:
        """A change of these channels; `change` sees them in the last dimension."""
        return Edit(self, change)


@dataclass(frozen=True)
class Edit:
    """One linear map along one dimension of a tensor, the same for every row along it."""

    place: Place
    change: Callable[[Tensor], Tensor]  # float64 [rows, channels] -> the same shape

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor changed, computed in float64: float32, or wider where it was."""
        rows = tensor.movedim(self.place.axis, -1)
        flat = rows.reshape(-1, rows.shape[-1])
        out = torch.empty(flat.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)
        size = max(1, STRETCH // flat.shape[1])
        for start in range(0, len(flat), size):
            out[start : start + size] = self._rows(flat[start : start + size].double())
        return out.view(rows.shape).movedim(-1, self.place.axis)

    def _rows(self, rows: Tensor) -> Tensor:
        channels, offset = self.place.channels, self.place.offset
        if channels is None:
            return self.change(rows + offset) - offset
        index = torch.tensor(channels, device=rows.device)
        return rows.index_copy(1, index, self.change(rows[:, index] + offset) - offset)
