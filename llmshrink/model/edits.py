"""Changes of tensors, made whenever they are read: what a transform does to a checkpoint that nobody writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

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

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows that hold the dimension, float64, changed."""
        channels, offset = self.place.channels, self.place.offset
        if channels is None:
            return self.change(rows + offset) - offset
        index = torch.tensor(channels, device=rows.device)
        return rows.index_copy(1, index, self.change(rows[:, index] + offset) - offset)


def changed(tensor: Tensor, edits: Sequence[Edit], dtype: torch.dtype) -> Tensor:
    """A tensor after these changes, in this dtype; computed in float64, a few rows at a time."""
    wide, runs = torch.promote_types(tensor.dtype, torch.float32), groupby(edits, key=lambda edit: edit.place.axis)
    together = [(axis, list(run)) for axis, run in runs]
    for left, (axis, run) in zip(reversed(range(len(together))), together, strict=True):
        tensor = _along(tensor, axis, run, wide if left else dtype)
    return tensor


def _along(tensor: Tensor, axis: int, edits: list[Edit], dtype: torch.dtype) -> Tensor:
    moved = tensor.movedim(axis, -1)
    rows = moved.reshape(-1, moved.shape[-1])
    out = torch.empty(rows.shape, dtype=dtype, device=tensor.device)
    size = max(1, STRETCH // rows.shape[1])
    for start in range(0, len(rows), size):
        part = rows[start : start + size].double()
        for edit in edits:
            part = edit(part)
        out[start : start + size] = part
    return out.view(moved.shape).movedim(-1, axis)
