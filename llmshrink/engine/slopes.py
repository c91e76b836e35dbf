"""What an error at the outputs of a linear costs, token by token: squared gradients, in a pass of their own.

How far a model's distribution goes from what it was is, to second order, a parabola in the outputs of a linear; its
curvature is the mean square of the gradient of log p, for tokens drawn from the model itself (the Fisher information).
SqueezeLLM (Kim et al. 2024, arXiv 2306.07629) weighs each weight by its squared gradient. Here the gradients of all
outputs of a token are averaged, and weigh its inputs in the Hessian (GuidedQuant, Kim et al. 2025, arXiv 2505.07004,
with one group of outputs): the diagonal is the mean of the squared gradients of a column, and what lies beside it lets
columns make up for each other as before.
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
from llmshrink.io import safetensors
from llmshrink.io.files import has_hash, sealed, unsealed, write_bytes
from llmshrink.model.anatomy import Block, Group
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.work import Work
from llmshrink.progress import Progress
from llmshrink.statistics import Fisher

MADE = "slopes.json"  # in the folder of work: the files that are there, with their SHA-256


def make_slopes(work: Work, batches: list[Tensor], seed: int, *, folder: Path, progress: Progress) -> None:
    """Find what the tokens of each group count that is weighed by gradients, one file for each block in `folder`.

    A run that goes on has them already: what is compressed was weighed by them.

    Args:
        work: the plan.
        batches: token ids [rows, length] each, all of one length.
        seed: of the tokens that are drawn.
        folder: of the run's work.
        progress: told of each block.
    """
    path = folder / MADE
    known = unsealed(path.read_bytes()) if path.is_file() else None
    if known is None or not all(has_hash(folder / name, digest) for name, digest in known.items()):
        model = StreamedModel(work.model.source, work.model.device)  # of its own: the embedding of the other may change
        groups = {block.index: weighed(work, block) for block in model.anatomy.blocks}
        progress.start("weigh tokens by gradients", 2 * len(groups))
        slopes = Slopes(model, groups, work.economy.logits, seed, folder, progress)
        files = slopes.run(Hidden(model, batches, folder=folder if work.economy.on_disk else None))
        write_bytes(path, sealed(files))
        progress.finish()


def weighed(work: Work, block: Block) -> list[Group]:
    """The groups of a block whose tokens are weighed."""
    return [group for group in block.groups if Fisher in work.needs(group)]


def slopes_of(work: Work, block: Block, folder: Path) -> dict[Group, Tensor]:
    """What each token counts for the groups of a block that are weighed: float32 [rows, length] of mean 1."""
    groups = weighed(work, block)
    if not groups:
        return {}
    made = safetensors.Checkpoint(folder, safetensors.read_header(folder / _name(block.index)))
    return {group: made.get(str(number)) for number, group in enumerate(groups)}


class Slopes:
    """Mean squared gradients of tokens, while they go back through the blocks of a model."""

    def __init__(
        self,
        model: StreamedModel,
        groups: Mapping[int, list[Group]],
        logits: int,
        seed: int,
        folder: Path,
        progress: Progress,
    ) -> None:
        """Begin.

        Args:
            model: to be differentiated; nothing of it is changed.
            groups: of each block, those whose outputs are looked at.
            logits: bytes of the head's output at a time.
            seed: of the tokens that are drawn.
            folder: for the results, and the states between blocks.
            progress: told of each block, on the way there and back.
        """
        self._model, self._groups, self._logits, self._seed = model, groups, logits, seed
        self._folder, self._progress = folder, progress
        self._hooks: list[RemovableHandle] = []
        self._squares: dict[Group, list[Tensor]] = {}  # of each batch [rows, length]
        self._files: dict[str, str] = {}

    def run(self, hidden: Hidden) -> dict[str, str]:
        """Write a file for each block by the rows of `hidden`, which is used up; their SHA-256 by their names."""
        backward(hidden, self, lambda batch, state: self._loss(batch, hidden.batches[batch], state), self._folder)
        return self._files

    def _loss(self, batch: int, tokens: Tensor, state: Tensor) -> tuple[float, Tensor]:
        generator = torch.Generator().manual_seed(self._seed + batch)

        def drawn(_: slice, logits: Tensor) -> Tensor:
            chances = logits.detach().float().softmax(-1).flatten(0, 1).cpu()
            return torch.multinomial(chances, 1, generator=generator)[:, 0]

        return surprise(self._model, tokens, state, tokens.shape[1], self._logits, drawn)

    # --- as `backward` wants it

    def load(self, index: int) -> Mapping[str, Tensor]:
        """Put a block into memory, and look at what its linears give out."""
        self._model.load_block(index)
        self._progress.advance(1, f"block {index}")
        block = self._model.model.get_submodule(self._model.anatomy.blocks[index].prefix)
        self._hooks.append(block.register_forward_pre_hook(partial(self._begin, index)))
        for group in self._groups[index]:
            for module in dict.fromkeys(site.module for site in group.sites):
                look = self._look(group)
                self._hooks.append(self._model.model.get_submodule(module).register_forward_hook(look))
        return {}

    def collect(self, index: int, leaves: Mapping[str, Tensor]) -> None:
        """Write what was found in a block."""
        found = {}
        for number, group in enumerate(self._groups[index]):
            squares = torch.cat(self._squares.pop(group))
            mean = float(squares.mean(dtype=torch.float64))
            found[str(number)] = squares / mean if mean else torch.ones_like(squares)
        if found:
            path = self._folder / _name(index)
            self._files[path.name] = safetensors.write(path, found)

    def drop(self, index: int) -> None:
        """Take a block out of memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._model.drop_block(index)

    def _begin(self, index: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        (state, *_rest) = args
        if state.requires_grad:  # on the way back, one batch after another
            for group in self._groups[index]:
                self._squares.setdefault(group, []).append(torch.zeros(state.shape[:2]))

    def _look(self, group: Group) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(gradient: Tensor) -> None:
            found = self._squares[group][-1]
            found += gradient.float().square().sum(-1).view(found.shape).cpu()  # some linears get all tokens in one row

        def look(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(add)  # type: ignore[no-untyped-call]

        return look


def _name(index: int) -> str:
    return f"slopes-{index:05d}.safetensors"
