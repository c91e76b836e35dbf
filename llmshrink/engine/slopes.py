"""What an error at the outputs of a linear costs, token by token: squared gradients, in a pass of their own.

How far a model's distribution goes from what it was is, to second order, a parabola in the outputs of a linear; its
curvature is the mean square of the gradient of log p, for tokens drawn from the model itself (the Fisher information).
SqueezeLLM (Kim et al. 2024, arXiv 2306.07629) weighs each weight by its squared gradient. Here the gradients of all
outputs of a token are averaged, and weigh its inputs in the Hessian (GuidedQuant, Kim et al. 2025, arXiv 2505.07004,
with one group of outputs): the diagonal is the mean of the squared gradients of a column, and what lies beside it lets
columns make up for each other as before.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmshrink.engine.backward import backward, surprise
from llmshrink.engine.hidden import Hidden
from llmshrink.io import safetensors
from llmshrink.io.files import has_hash, sealed, unsealed, write_bytes
from llmshrink.memory import release
from llmshrink.model.anatomy import Block, Group
from llmshrink.model.streamed import BATCH_TOKENS, StreamedModel
from llmshrink.plan.work import Work
from llmshrink.progress import Progress
from llmshrink.statistics import Fisher

MADE = "slopes.json"  # in the folder of work: the files that are there, with their SHA-256
LEAST = 2 * BATCH_TOKENS  # tokens that go through the model together


def make_slopes(work: Work, parts: list[list[Tensor]], seed: int, *, folder: Path, progress: Progress) -> None:
    """Find what the tokens of each group count that is weighed by gradients, in files in `folder`.

    One part after another goes through the whole model and back, and has a file: a run that goes on takes those that
    are whole. What is compressed was weighed by them.

    Args:
        work: the plan.
        parts: batches [rows, length] of token ids that go together, as many tokens as `together` says.
        seed: of the tokens that are drawn.
        folder: of the run's work.
        progress: told of each part.
    """
    path = folder / MADE
    known = (unsealed(path.read_bytes()) if path.is_file() else None) or {}
    made = {name: digest for name, digest in known.items() if has_hash(folder / name, digest)}
    named = {f"slopes-{number:05d}.safetensors": part for number, part in enumerate(parts)}
    if made.keys() >= named.keys():
        return
    sizes = {name: sum(batch.numel() for batch in part) for name, part in named.items()}
    progress.start("weigh tokens by gradients", sum(sizes.values()), sum(sizes[name] for name in made))
    generator = torch.Generator().manual_seed(seed)
    model = StreamedModel(work.model.source, work.model.device)  # of its own: the embedding of the other may change
    slopes = Slopes(model, {block.index: weighed(work, block) for block in model.anatomy.blocks}, work.economy.logits)
    below = folder if work.economy.on_disk else None
    for name, part in named.items():
        # Row by row: they do not depend on the batches, nor on what is there already.
        draws = [torch.stack([torch.rand(len(row), generator=generator) for row in batch]) for batch in part]
        if name not in made:
            made[name] = safetensors.write(folder / name, slopes.run(Hidden(model, part, folder=below), draws, below))
            write_bytes(path, sealed(made))
            progress.advance(sizes[name], f"part {len(made)} of {len(named)}")
    progress.finish()
    del model, slopes
    release(work.model.device)  # a GPU holds the embedding and the head of that model


def together(tokens: int, depth: int) -> int:
    """How many of these tokens go through a model together: what is kept between its blocks is no more than once all.

    Each stretch has every block loaded twice; fewer than LEAST would be loaded for next to nothing.
    """
    return max(LEAST, tokens // (depth + 1))


def weighed(work: Work, block: Block) -> list[Group]:
    """The groups of a block whose tokens are weighed."""
    return [group for group in block.groups if Fisher in work.needs(group)]


def slopes_of(work: Work, block: Block, folder: Path) -> dict[Group, Tensor]:
    """What each token counts for the groups of a block that are weighed: float32 [tokens of all rows], of mean 1."""
    groups, found = weighed(work, block), {}
    if not groups:
        return {}
    names = sorted(unsealed((folder / MADE).read_bytes()))
    parts = [safetensors.Checkpoint(folder, safetensors.read_header(folder / name)) for name in names]
    for number, group in enumerate(groups):
        squares = torch.cat([part.get(_name(block.index, number)) for part in parts])
        mean = float(squares.mean(dtype=torch.float64))
        found[group] = squares / mean if mean else torch.ones_like(squares)
    return found


class Slopes:
    """Squared gradients of tokens, summed over the outputs of a group, while they go back through a model's blocks."""

    def __init__(self, model: StreamedModel, groups: Mapping[int, list[Group]], logits: int) -> None:
        """Begin.

        Args:
            model: to be differentiated; nothing of it is changed.
            groups: of each block, those whose outputs are looked at.
            logits: bytes of the head's output at a time.
        """
        self._model, self._groups, self._logits = model, groups, logits
        self._hooks: list[RemovableHandle] = []
        self._now = threading.local()  # the batch that a thread takes back
        self._squares: dict[Group, list[Tensor]] = {}  # of each batch [tokens], on the model's device

    def run(self, hidden: Hidden, draws: list[Tensor], folder: Path | None) -> dict[str, Tensor]:
        """The sums of the tokens of `hidden`, which is used up: float32 [tokens] for each block and group.

        Args:
            hidden: what enters the first block.
            draws: of each batch [rows, length], numbers from 0 to 1 that say which token follows.
            folder: the states between blocks lie in files there; None: in the device's memory.
        """
        self._found: dict[str, Tensor] = {}
        self._sizes = [batch.numel() for batch in hidden.batches]

        def head(batch: int, state: Tensor) -> tuple[float, Tensor]:
            tokens = hidden.batches[batch]
            drawn = partial(_drawn, draws[batch].to(self._model.device))
            return surprise(self._model, tokens, state, tokens.shape[1], self._logits, drawn)

        backward(hidden, self, head, folder, begin=self._begin)
        return self._found

    # --- as `backward` wants it

    def load(self, index: int) -> Mapping[str, Tensor]:
        """Put a block into memory, and look at what its linears give out."""
        self._model.load_block(index)
        for group in self._groups[index]:
            self._squares[group] = [torch.zeros(size, device=self._model.device) for size in self._sizes]
            for module in dict.fromkeys(site.module for site in group.sites):
                look = partial(self._look, self._squares[group])
                self._hooks.append(self._model.model.get_submodule(module).register_forward_hook(look))
        return {}

    def collect(self, index: int, leaves: Mapping[str, Tensor]) -> None:
        """Keep what was found in a block."""
        for number, group in enumerate(self._groups[index]):
            self._found[_name(index, number)] = torch.cat(self._squares[group]).cpu()

    def drop(self, index: int) -> None:
        """Take a block out of memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._squares.clear()
        self._model.drop_block(index)

    def _begin(self, batch: int) -> None:
        self._now.batch = batch

    def _look(self, squares: list[Tensor], _: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:  # on the way back
            out.register_hook(partial(_add, squares[self._now.batch]))  # type: ignore[no-untyped-call]


def _add(squares: Tensor, gradient: Tensor) -> None:
    squares += torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).square_().view(-1)


def _drawn(draws: Tensor, part: slice, chances: Tensor) -> Tensor:
    """Tokens [rows, positions] by `draws` [rows, length], for logarithms of chances [rows, positions, width]."""
    upto = chances.exp().cumsum_(-1)
    wanted = draws[:, part, None] * upto[..., -1:]
    return torch.searchsorted(upto, wanted, right=True)[..., 0].clamp_(max=upto.shape[-1] - 1)


def _name(index: int, number: int) -> str:
    """Of a tensor of a block's group, in each file."""
    return f"{index}.{number}"
