"""Early layers that learn to say what the last one says, through the model's own norm and head: one model, one pass.

Be Your Own Teacher (Zhang et al. 2019, arXiv 1905.08094), with the head that is there (as LayerSkip has it, Elhoushi
et al. 2024, arXiv 2404.16710): the last layer teaches and gets no gradient of that; what it learns itself is the loss
of the training. Layers behind an exit can afterwards be dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmshrink.recipe.distill import LossSpec
from llmshrink.train.chunks import summed
from llmshrink.train.heads import Halves
from llmshrink.train.hidden import Taps
from llmshrink.train.losses import mixed


class Exits:
    """The term beside a loss that teaches early layers."""

    def __init__(self, model: PreTrainedModel, halves: Halves, layers: Sequence[int]) -> None:
        """Begin.

        Args:
            model: that learns, without what wraps it.
            halves: of it; its body is run before a loss is asked for.
            layers: of which the outputs leave it early.
        """
        self._halves, self._taps = halves, Taps(model, layers)

    def watching(self) -> AbstractContextManager[None]:
        """See the states of a forward pass."""
        return self._taps.open()

    def loss(self, last: Tensor, labels: Tensor, spec: LossSpec, positions: int) -> Tensor:
        """The mean over the exits of how far each is from the last layer, a sum over tokens.

        Args:
            last: what the body gave out [rows, length, hidden].
            labels: the tokens that follow [rows, length]; -100 where none counts.
            spec: what is made small; its mixture with the text too.
            positions: how many are seen at a time.
        """
        wanted = last.detach()
        if spec.name == "uld":  # that is for others
            spec = spec.model_copy(update={"name": "kl"})

        seen, self._taps.seen = list(self._taps.seen.values()), {}
        states = torch.cat([state[:, : last.shape[1]] for state in seen])  # in one go: the last is looked at once

        def part(state: Tensor, span: slice) -> Tensor:
            with torch.no_grad():
                words = self._halves.head(wanted[:, span]).repeat(len(seen), 1, 1)
            own, follow = self._halves.head(self._halves.tail(state)), labels[:, span].repeat(len(seen), 1)
            return mixed(own.flatten(0, 1), words.flatten(0, 1), follow.flatten(), spec)

        learning = [*self._halves.parameters, *self._halves.tail_parameters]
        return summed(part, states, learning, max(1, positions // len(seen))) / len(seen)
