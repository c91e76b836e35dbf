"""Gradients through all blocks of a model, of which one at a time is in memory.

Reverse mode by block: on the way forward only the states between blocks are kept; on the way back each block is loaded
again, run again on what entered it, and differentiated alone (recomputation: Chen et al. 2016, arXiv 1604.06174). What
is held does not grow with depth but for these states, which may lie in files. What is learned is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmshrink.engine.hidden import Hidden, on_disk
from llmshrink.engine.lanes import side_by_side
from llmshrink.memory import trim
from llmshrink.model.streamed import StreamedModel

Targets = Callable[[slice, Tensor], Tensor]
Head = Callable[[int, Tensor], tuple[float, Tensor]]


class Blocks(Protocol):
    """What is differentiated: it puts blocks into memory and takes gradients."""

    def load(self, index: int) -> Mapping[str, Tensor]:
        """Put a block into memory.

        Returns:
            By their keys on disk, the tensors that stand in it and whose gradients are wanted: leaves.
        """

    def collect(self, index: int, leaves: Mapping[str, Tensor]) -> None:
        """Take the gradients that these leaves have now; those of what was not reached are None."""

    def drop(self, index: int) -> None:
        """Take a block out of memory."""


def forward(hidden: Hidden, blocks: Blocks, before: Callable[[int], None] | None = None) -> None:
    """Take all states of a model through its blocks, as they are now; nothing is refused, however large it gets.

    Args:
        hidden: the states that enter the first block.
        blocks: gives the blocks.
        before: told of each block before the states go through it.
    """
    for block in hidden.model.anatomy.blocks:
        if before is not None:
            before(block.index)
        blocks.load(block.index)

        def run(batch: int, index: int = block.index) -> None:
            hidden.states[batch].copy_(hidden.run(index, batch))

        if len(hidden.states) == 1:  # with all cores: nothing runs beside it
            with torch.no_grad():
                run(0)
        else:
            for _ in side_by_side(hidden.model.device, run, len(hidden.states)):
                pass
        blocks.drop(block.index)
        trim()


def backward(
    hidden: Hidden,
    blocks: Blocks,
    head: Head,
    folder: Path | None = None,
    *,
    begin: Callable[[int], None] | None = None,
) -> float:
    """The loss of some batches; what it depends on gets its gradients by `blocks.collect` and in `head`.

    Args:
        hidden: the states that enter the first block; they are used up.
        blocks: gives the blocks.
        head: for the number of a batch and the state that left the last block, its loss and the gradient of that state.
        folder: keep the states between blocks in files there; None: in the device's memory.
        begin: where nothing is learned, there are no leaves and batches go back side by side: told of each before it
            does so through a block, in the thread that runs it. None: one after another, as their gradients are added.

    Returns:
        The sum of all batches' losses.
    """
    entered: list[list[Tensor]] = []

    def keep(_: int) -> None:
        entered.append([state.clone() if folder is None else on_disk(folder, state) for state in hidden.states])

    forward(hidden, blocks, keep)
    found = [head(batch, state) for batch, state in enumerate(hidden.states)]
    gradients = [gradient for _, gradient in found]
    for block in reversed(hidden.model.anatomy.blocks):
        leaves = blocks.load(block.index)
        hidden.states = entered.pop()

        def back(batch: int, index: int = block.index, leaves: Mapping[str, Tensor] = leaves) -> None:
            state = hidden.states[batch].requires_grad_()
            if begin is not None:
                begin(batch)
            with torch.enable_grad():
                out = hidden.run(index, batch, leaves)
            torch.autograd.backward(out, gradients[batch].to(out.device, out.dtype))
            assert state.grad is not None
            gradients[batch] = state.grad

        count = len(hidden.states)
        for _ in map(back, range(count)) if begin is None else side_by_side(hidden.model.device, back, count):
            pass
        blocks.collect(block.index, leaves)
        blocks.drop(block.index)
        trim()
    return sum(loss for loss, _ in found)


def surprise(
    model: StreamedModel, tokens: Tensor, state: Tensor, positions: int, logits: int, targets: Targets
) -> tuple[float, Tensor]:
    """Cross entropy of some tokens, summed, nats, and its gradient by the state that left the last block.

    Args:
        model: that gives out logits.
        tokens: ids [rows, length].
        state: [rows, length, hidden].
        positions: how many of a row count, from the first.
        logits: bytes of the head's output at a time.
        targets: for a stretch of positions and the logarithms of the chances there [rows, positions, width], the tokens
            [rows, positions] whose entropy it is.
    """
    gradient, total = torch.zeros_like(state), 0.0
    stretch = max(1, logits // (len(tokens) * model.width * 4))
    for start in range(0, positions, stretch):
        part = slice(start, min(start + stretch, positions))
        leaf = state[:, part].to(model.device).detach().requires_grad_()
        with torch.enable_grad():
            out = model.output(tokens[:, part], leaf, {})
        chances = torch.log_softmax(out.detach().float(), -1)
        wanted = targets(part, chances).to(out.device)[..., None]
        total -= float(chances.gather(-1, wanted).sum(dtype=torch.float64))
        chances.exp_().scatter_add_(-1, wanted, chances.new_full(wanted.shape, -1))  # the gradient by the logits
        torch.autograd.backward(out, chances.to(out.dtype))
        assert leaf.grad is not None
        gradient[:, part] = leaf.grad
    return total, gradient
