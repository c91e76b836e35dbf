"""How far the states between a student's layers are from its teacher's: seen by hooks on the blocks, in any family.

SquareHead (Kurtic et al. 2023, arXiv 2310.06927, equation 3) divides the mean squared difference of a layer by the mean
square of the teacher's states, so that layers with large states count no more than others. Where widths differ a matrix
makes one of the other (FitNets, Romero et al. 2015, arXiv 1412.6550), here from its least squares fit on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmshrink.model.anatomy import block_list
from llmshrink.recipe.modes import HiddenSpec
from llmshrink.train.teachers import Online

PROJECTIONS = "projections"  # within the body of the student, so that they learn and are saved with it
DAMP = 1e-2  # of a fit, of the mean square of the student's states
ENOUGH = 8  # times as many tokens as channels are fitted to


class Taps:
    """What leaves some blocks of a model, while it is watched."""

    def __init__(self, model: PreTrainedModel, layers: Iterable[int]) -> None:
        blocks = block_list(model)[1]
        self._blocks = {layer: blocks[layer] for layer in layers}
        self.seen: dict[int, Tensor] = {}  # [rows, length, width]

    @contextmanager
    def open(self) -> Iterator[None]:
        """Watch; checkpointed blocks that are run again later are not seen twice."""
        handles = [block.register_forward_hook(partial(self._keep, layer)) for layer, block in self._blocks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, layer: int, _: nn.Module, __: Any, out: Any) -> None:
        self.seen[layer] = out if isinstance(out, Tensor) else out[0]


class Likeness:
    """The term beside a loss that draws states of a student to those of its teacher."""

    def __init__(self, student: PreTrainedModel, teacher: Online, pairs: Mapping[int, int], spec: HiddenSpec) -> None:
        """Begin; projections, where there are any, become a part of the student until `remove`.

        Args:
            student: that learns.
            teacher: whom it learns from; of its states those count that stand at places of the student's.
            pairs: layers of the student, each with one of the teacher.
            spec: what the recipe says.
        """
        self._pairs, self._spec, self._body = pairs, spec, student.get_decoder()
        self._teacher = teacher
        self._own, self._others = Taps(student, pairs), Taps(teacher.model, set(pairs.values()))
        own, other = (m.config.get_text_config(decoder=True).hidden_size for m in (student, teacher.model))
        self._width, self._projections = own, dict[int, nn.Linear]()  # of each layer, where there are any
        if spec.projection is True or own != other:
            self._projections = {layer: nn.Linear(own, other, bias=False) for layer in pairs}
            learned = {str(layer): projection for layer, projection in self._projections.items()}
            self._body.add_module(PROJECTIONS, nn.ModuleDict(learned))

    def remove(self) -> None:
        """Make the student what it is without projections."""
        if self._projections:
            delattr(self._body, PROJECTIONS)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the states of all forward passes of both."""
        with self._own.open(), self._others.open():
            yield

    def _states(self, counted: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Layers, with the student's states and the teacher's [tokens, width] of what counts, in float32."""
        rows, columns = places = counted.nonzero(as_tuple=True)
        if self._teacher.places is not None:  # it reads other tokens
            columns = self._teacher.places[places]
            rows, columns = rows[columns >= 0], columns[columns >= 0]
            counted = counted & (self._teacher.places[:, : counted.shape[1]] >= 0)
        for layer, other in self._pairs.items():
            own, wanted = self._own.seen[layer], self._others.seen[other]
            yield layer, own[:, : counted.shape[1]][counted].float(), wanted[rows, columns].float()

    def loss(self, counted: Tensor) -> Tensor:
        """The weighted term, a sum over tokens, of what was seen last.

        Args:
            counted: which positions count [rows, positions]; there may be more states behind them.
        """
        found = []
        for layer, own, wanted in self._states(counted):
            made = self._projections[layer](own) if self._projections else own
            found.append(apart(made, wanted, self._spec.loss))
        self._own.seen, self._others.seen = {}, {}
        return self._spec.weight * torch.stack(found).mean()

    @torch.no_grad()
    def fit(self, counted: Iterable[Tensor]) -> None:
        """Begin with the projections that least squares gives.

        Args:
            counted: gives which positions count, one batch after another, each once both models have been run on it.
        """
        if not self._projections:
            return
        sums: dict[int, list[Tensor]] = {}
        tokens = 0
        for mask in counted:
            tokens += int(mask.sum())
            for layer, own, wanted in self._states(mask):
                both = own.T @ own, own.T @ wanted
                sums[layer] = [a + b for a, b in zip(sums[layer], both, strict=True)] if layer in sums else [*both]
            if tokens >= ENOUGH * self._width:
                break
        for layer, (gram, cross) in sums.items():
            gram.diagonal().add_(DAMP * gram.diagonal().mean())
            self._projections[layer].weight.copy_(torch.linalg.solve(gram, cross).T)


def apart(own: Tensor, wanted: Tensor, kind: str) -> Tensor:
    """How far states [tokens, width] are from others, summed over tokens."""
    if kind == "cosine" or not len(own):
        return (1 - functional.cosine_similarity(own, wanted, dim=-1)).sum()
    squares = (own - wanted).square().mean(-1)
    return squares.sum() if kind == "mse" else squares.mean() / wanted.square().mean() * len(own)
