"""What neurons and heads are worth by the gradient of the loss: the change to first order of the loss without them.

For a thing whose inner results x reach the linear that reads it, and g the gradient of a row's loss by x: the mean over
rows of (sum over its columns and the row's tokens of x g)^2 (Molchanov et al. 2019, arXiv 1906.10771, with a gate on
each thing; the loss is the cross entropy of the next token).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmshrink.engine.backward import backward, surprise
from llmshrink.engine.hidden import Hidden
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel


class Taylor:
    """Sums of squares, while gradients go back through the blocks of a causal model."""

    def __init__(
        self, model: StreamedModel, readers: Mapping[tuple[int, str], tuple[Matrix, int]], logits: int
    ) -> None:
        """Begin.

        Args:
            model: to be differentiated; nothing of it is changed.
            readers: by the number of a block and the name of a width, the linear that reads the things and how many
                there are.
            logits: bytes of the head's output at a time.
        """
        self._model, self._readers, self._logits = model, readers, logits
        self._sums = {
            place: torch.zeros(total, dtype=torch.float64, device=model.device) for place, (_, total) in readers.items()
        }
        self._hooks: list[RemovableHandle] = []
        self._rows = 1  # of the batch that runs

    def run(self, hidden: Hidden, folder: Path | None) -> dict[tuple[int, str], Tensor]:
        """The worth of all things [things], float64, by the rows of `hidden`, which is used up.

        The states between blocks lie in files in `folder`; None: in the device's memory.
        """
        rows = sum(hidden.rows)
        backward(hidden, self, lambda batch, state: self._loss(hidden.batches[batch], state), folder)
        return {place: total / rows for place, total in self._sums.items()}

    def _loss(self, tokens: Tensor, state: Tensor) -> tuple[float, Tensor]:
        """Cross entropy of the next tokens, summed, nats, and its gradient by the state; some positions at a time."""

        def following(part: slice, _: Tensor) -> Tensor:
            return tokens[:, part.start + 1 : part.stop + 1]

        return surprise(self._model, tokens, state, tokens.shape[1] - 1, self._logits, following)

    # --- as `backward` wants it

    def load(self, index: int) -> Mapping[str, Tensor]:
        """Put a block into memory, and look at what its readers multiply."""
        self._model.load_block(index)
        block = self._model.model.get_submodule(self._model.anatomy.blocks[index].prefix)
        self._hooks.append(block.register_forward_pre_hook(self._begin))
        for place, (matrix, _) in self._readers.items():
            if place[0] == index:
                module = self._model.model.get_submodule(matrix.site.module)
                self._hooks.append(module.register_forward_pre_hook(self._look(self._sums[place])))
        return {}

    def collect(self, index: int, leaves: Mapping[str, Tensor]) -> None:
        """Nothing of the block itself has a gradient."""

    def drop(self, index: int) -> None:
        """Take a block out of memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._model.drop_block(index)

    def _begin(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._rows = len(args[0])  # some linears get all tokens in one dimension

    def _look(self, total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            if x.requires_grad:
                take: Callable[[Tensor], None] = partial(self._add, total, x.detach(), self._rows)
                x.register_hook(take)  # type: ignore[no-untyped-call]

        return look

    def _add(self, total: Tensor, x: Tensor, rows: int, gradient: Tensor) -> None:
        of_columns = (x.double() * gradient.double()).reshape(rows, -1, x.shape[-1]).sum(1)
        total += of_columns.view(len(of_columns), len(total), -1).sum(-1).square().sum(0)
