"""The hidden states between two blocks: one tensor for each batch of rows, and the arguments blocks are called with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from llmshrink.engine.lanes import side_by_side
from llmshrink.errors import InputError
from llmshrink.io import safetensors
from llmshrink.model.capture import Record
from llmshrink.model.streamed import StreamedModel


class Hidden:
    """The states of all rows as they enter the next block, updated in place block by block."""

    def __init__(self, model: StreamedModel, batches: list[Tensor]) -> None:
        self._model = model
        self._records: list[Record] = []
        self.states: list[Tensor] = []
        known: dict[torch.Size, Record] = {}
        for tokens in batches:
            record = model.record(tokens)
            self.states.append(record.hidden)
            # Masks and positions follow from the shape of a batch in most families: they are kept once. A family
            # where they depend on the tokens has its own for each batch.
            first = known.setdefault(tokens.shape, Record(record.hidden.new_empty(0), record.arguments))
            same = _equal(first.arguments, record.arguments)
            self._records.append(first if same else Record(first.hidden, record.arguments))

    def run(self, index: int, batch: int) -> Tensor:
        """The output of block `index` for one batch; the state stays as it is."""
        return self._model.run(index, self._records[batch], self.states[batch])

    def advance(self, index: int, done: Callable[[int], None] | None = None) -> float:
        """Replace every state by the output of the loaded block.

        Args:
            index: which block.
            done: told of the rows x length of each batch.

        Returns:
            The largest magnitude in these outputs.

        Raises:
            InputError: the outputs are not finite.
        """

        def run(batch: int) -> tuple[int, float]:
            out = self.run(index, batch)
            low, high = (float(value) for value in torch.aminmax(out))
            if not abs(low) + abs(high) < float("inf"):
                raise InputError(
                    f"Block {index} gives infinite or undefined activations on batch {batch}.",
                    hint="The weights overflow the compute dtype, or are damaged.",
                )
            self.states[batch].copy_(out)  # in place: states that wander through the heap leave holes in it
            return out.shape[0] * out.shape[1], max(-low, high)

        largest = 0.0
        for size, found in side_by_side(self._model.device, run, len(self.states)):
            largest = max(largest, found)
            if done:
                done(size)
        return largest

    def forget(self, batches: int) -> None:
        """Drop the states of the first batches."""
        del self.states[:batches], self._records[:batches]

    def load(self, path: Path) -> None:
        """Take the states from a file that `save_states` wrote."""
        checkpoint = safetensors.Checkpoint(path.parent, safetensors.read_header(path))
        names = sorted(checkpoint.infos)
        self.forget(len(self.states) - len(names))  # they were saved after these were forgotten
        for state, name in zip(self.states, names, strict=True):
            state.copy_(checkpoint.get(name))


def _equal(one: Any, other: Any) -> bool:
    """Whether two trees of arguments are the same, tensors by value."""
    (a, kind), (b, other_kind) = tree_flatten(one), tree_flatten(other)
    return kind == other_kind and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
        for x, y in zip(a, b, strict=True)
    )


def save_states(path: Path, states: list[Tensor]) -> str:
    """Write states exactly; returns the file's SHA-256."""
    return safetensors.write(path, {f"{i:06d}": state for i, state in enumerate(states)})
