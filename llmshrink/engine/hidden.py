"""The hidden states between two blocks: one tensor for each batch of rows, and the arguments blocks are called with."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from llmshrink.engine.lanes import side_by_side
from llmshrink.errors import InputError
from llmshrink.io import safetensors
from llmshrink.io.files import naming
from llmshrink.memory import trim
from llmshrink.model.capture import Record
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.surgery import Original


class Hidden:
    """The states of all rows as they enter the next block, updated in place block by block.

    Attributes:
        model: Whose blocks they go through.
        batches: Token ids [rows, length] of each batch, the probe not among them.
        states: One for each batch, then the probe's.
        originals: One for each batch, which go through the original's blocks; none where nobody asked for them.
        entered: The same as they entered the block, once `advance_originals` took them through it; only of an original
            that is another model.
    """

    def __init__(
        self,
        model: StreamedModel,
        batches: list[Tensor],
        probe: Tensor | None = None,
        folder: Path | None = None,
        *,
        originals: bool = False,
        original: Original | None = None,
    ) -> None:
        """Embed token ids.

        Args:
            model: whose blocks the states go through.
            batches: token ids [rows, length] of each.
            probe: one more batch, which is never split and goes further than the others.
            folder: keep the states in files there, which vanish with the process; None: in the device's memory.
            originals: keep the states of the original model too.
            original: that model, where it is not `model` itself.

        Raises:
            OSError: the disk is full.
        """
        self.model, self._folder = model, folder
        self._original = original
        self.batches, self._probe = list(batches), probe
        self._records = _Records(model)
        self.states = [
            self._kept(self._records.add(tokens)) for tokens in (*batches, *([] if probe is None else [probe]))
        ]
        self.entered: list[Tensor] = []
        if not originals or original is None:
            self._lessons = self._records
            first = self.states[: len(batches)] if originals else []
            self.originals = [state.clone() if folder is None else on_disk(folder, state) for state in first]
        else:
            self._lessons = _Records(original.model)
            self.originals = [self._kept(self._lessons.add(tokens)) for tokens in batches]
            self.entered = [self._kept(state.clone()) for state in self.originals]
            self._take_originals(range(original.blocks[0]))

    @property
    def original(self) -> Original:
        """The model that this one was cut out of."""
        assert self._original is not None
        return self._original

    def _kept(self, state: Tensor) -> Tensor:
        return state if self._folder is None else on_disk(self._folder, state)

    @property
    def rows(self) -> list[int]:
        """Rows of each batch."""
        return [len(batch) for batch in self.batches]

    def within(self, tokens: int) -> list[int]:
        """Rows of each batch, were the batches cut into ones of at most `tokens` tokens, or of one row."""
        return [len(part) for batch in self.batches for part in torch.split(batch, max(1, tokens // batch.shape[1]))]

    def split(self, rows: list[int]) -> None:
        """Cut the batches into ones of these numbers of rows, each within one of those there are."""
        if rows == self.rows:
            return
        left, count = iter(rows), len(self.batches)
        sizes: list[list[int]] = []
        for batch in self.batches:
            sizes.append([])
            while sum(sizes[-1]) < len(batch):
                sizes[-1].append(next(left))

        def cut(wholes: list[Tensor]) -> list[Tensor]:
            return [part for whole, rows in zip(wholes, sizes, strict=True) for part in torch.split(whole, rows)]

        self.batches, self.states[:count] = cut(self.batches), cut(self.states[:count])
        self.originals = cut(self.originals) if self.originals else []
        self.entered = cut(self.entered) if self.entered else []
        for records in {id(r): r for r in (self._records, self._lessons)}.values():
            records.replace(count, self.batches)

    def most_tokens(self) -> int:
        """Tokens of the largest batch that has several rows; 0 where none has."""
        return max((batch.numel() for batch in self.batches if len(batch) > 1), default=0)

    @property
    def kept(self) -> list[Tensor]:
        """All states, as a run that goes on needs them."""
        return [*self.states, *self.originals]

    def run(
        self, index: int, batch: int, weights: Mapping[str, Tensor] | None = None, *, original: bool = False
    ) -> Tensor:
        """The output of block `index` for one batch; the state stays as it is.

        `weights` as `StreamedModel.run`; `original`: for the original's state.
        """
        return self._run(index, batch, self.originals if original else self.states, weights)

    def run_original(self, index: int, batch: int) -> Tensor:
        """What the original's loaded block makes of the state that entered the block which stands for it."""
        return self._run(self.original.blocks[index], batch, self.entered, of=self._lessons)

    def aim(self, batch: int) -> Tensor:
        """What should leave the block that the originals left last: their state, as the model has it."""
        state = self.originals[batch].to(self.model.device)
        return state if self._original is None else self._original.seen(state)

    def off(self) -> float:
        """The mean squared difference between the states and what they should be."""
        total, count = 0.0, 0
        for batch, state in enumerate(self.states[: len(self.batches)]):
            rest = state.to(self.model.device).float() - self.aim(batch).float()
            total, count = total + float(rest.square().sum(dtype=torch.float64)), count + rest.numel()
        return total / max(1, count)

    def _run(
        self,
        index: int,
        batch: int,
        states: list[Tensor],
        weights: Mapping[str, Tensor] | None = None,
        of: _Records | None = None,
    ) -> Tensor:
        records = of or self._records
        return records.model.run(index, records[batch], states[batch].to(self.model.device), weights)

    def probe(self, model: StreamedModel, index: int, state: Tensor) -> Tensor:
        """What the loaded block of another model makes of a state of the probe rows."""
        return model.run(index, self._records[-1], state.to(model.device))

    def advance_originals(self, index: int) -> None:
        """Take every state of the original through what block `index` stands for; nothing is loaded afterwards."""
        for before, state in zip(self.entered, self.originals, strict=bool(self.entered)):
            before.copy_(state)
        self._take_originals(range(index, index + 1) if self._original is None else self._original.stretch(index))

    def _take_originals(self, blocks: range) -> None:
        model = self._lessons.model
        for block in blocks:
            model.load_block(block)
            self._advance(block, self.originals, of=self._lessons)
            model.drop_block(block)
            trim()

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
        return self._advance(index, self.states, done)

    def advance_streams(self, index: int, streams: list[list[Tensor]]) -> None:
        """Take other states through the loaded block, in place: each stream has one for each batch."""

        def run(number: int) -> None:
            stream, batch = divmod(number, len(self.batches))
            streams[stream][batch].copy_(self._run(index, batch, streams[stream]))

        for _ in side_by_side(self.model.device, run, len(streams) * len(self.batches)):
            pass

    def _advance(
        self,
        index: int,
        states: list[Tensor],
        done: Callable[[int], None] | None = None,
        of: _Records | None = None,
    ) -> float:
        def run(batch: int) -> tuple[int, float]:
            out = self._run(index, batch, states, of=of)
            low, high = (float(value) for value in torch.aminmax(out))
            if not abs(low) + abs(high) < float("inf"):
                raise InputError(
                    f"Block {index} gives infinite or undefined activations on batch {batch}.",
                    hint="The weights overflow the compute dtype, or are damaged.",
                )
            states[batch].copy_(out)  # in place: states that wander through the heap leave holes in it
            return out.shape[0] * out.shape[1], max(-low, high)

        largest = 0.0
        for size, found in side_by_side(self.model.device, run, len(states)):
            largest = max(largest, found)
            if done:
                done(size)
        return largest

    def anew(self) -> Hidden:
        """The probe alone, as it enters the first block."""
        return Hidden(self.model, [], self._probe)

    def forget(self) -> None:
        """Drop all but the probe."""
        count = len(self.batches)
        del self.states[:count], self.batches[:], self.originals[:], self.entered[:]
        self._records.forget(count)

    def load(self, path: Path) -> None:
        """Take the states from a file that `save_states` wrote."""
        checkpoint = safetensors.Checkpoint(path.parent, safetensors.read_header(path))
        names = sorted(checkpoint.infos)
        if len(names) < len(self.kept):
            self.forget()  # as it was when they were saved
        for state, name in zip(self.kept, names, strict=True):
            state.copy_(checkpoint.get(name).view(state.shape))  # of the same batches, or it is an error


class _Records:
    """What a model's blocks are called with for each batch, and for the probe behind these."""

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        self._known: dict[torch.Size, Record] = {}
        self._all: list[Record] = []

    def __getitem__(self, batch: int) -> Record:
        return self._all[batch]

    def add(self, tokens: Tensor) -> Tensor:
        """Record one more batch; returns its state."""
        record = self.model.record(tokens)
        self._all.append(self._shared(tokens, record))
        return record.hidden

    def replace(self, count: int, batches: list[Tensor]) -> None:
        """Record other batches in place of the first `count`."""
        self._all[:count] = [self._shared(part, self.model.record(part)) for part in batches]

    def forget(self, count: int) -> None:
        """Drop the first."""
        del self._all[:count]

    def _shared(self, tokens: Tensor, record: Record) -> Record:
        """A record without its state; the same for batches of one shape.

        Masks and positions follow from the shape in most families. One where they depend on the tokens has its own for
        each batch.
        """
        first = self._known.setdefault(tokens.shape, Record(record.hidden.new_empty(0), record.arguments))
        return first if _equal(first.arguments, record.arguments) else Record(first.hidden, record.arguments)


def on_disk(folder: Path, tensor: Tensor) -> Tensor:
    """A copy that lies in a file without a name: memory the system can take back at any time."""
    with naming(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".state-", suffix=".tmp") as file:
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk is an error here, and a signal later
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.view(tensor.shape).copy_(tensor)


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
