"""The hidden states between two blocks: one tensor for each batch of rows, and the arguments blocks are called with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmshrink.errors import InputError
from llmshrink.io import safetensors
from llmshrink.model.capture import Record
from llmshrink.model.streamed import StreamedModel


class Hidden:
    """The states of all rows as they enter the next block, updated in place block by block."""

    def __init__(self, model: StreamedModel, batches: list[Tensor]) -> None:
        self._model = model
        self._records: dict[tuple[int, int], Record] = {}
        self.states: list[Tensor] = []
        for tokens in batches:
            record = model.record(tokens)
            shape = (tokens.shape[0], tokens.shape[1])
            self._records.setdefault(shape, Record(record.hidden.new_empty(0), record.arguments))
            self.states.append(record.hidden)

    def run(self, index: int, batch: int) -> Tensor:
        """The output of block `index` for one batch; the state stays as it is."""
        state = self.states[batch]
        return self._model.run(index, self._records[state.shape[0], state.shape[1]], state)

    @torch.no_grad()
    def advance(self, index: int, done: Callable[[int], None] | None = None) -> None:
        """Replace every state by the output of the loaded block.

        Raises:
            InputError: the outputs are not finite.
        """
        for batch in range(len(self.states)):
            out = self.run(index, batch)
            if not torch.isfinite(out.sum()):
                raise InputError(
                    f"Block {index} gives infinite or undefined activations on batch {batch}.",
                    hint="The weights overflow the compute dtype, or are damaged.",
                )
            self.states[batch] = out
            if done:
                done(out.shape[0] * out.shape[1])

    def forget(self, batches: int) -> None:
        """Drop the states of the first batches."""
        del self.states[:batches]

    def load(self, path: Path) -> None:
        """Take the states from a file that `save_states` wrote."""
        checkpoint = safetensors.Checkpoint(path.parent, safetensors.read_header(path))
        self.states = [checkpoint.get(name).to(self._model.device, copy=True) for name in sorted(checkpoint.infos)]


def save_states(path: Path, states: list[Tensor]) -> str:
    """Write states exactly; returns the file's SHA-256."""
    return safetensors.write(path, {f"{i:06d}": state for i, state in enumerate(states)})
