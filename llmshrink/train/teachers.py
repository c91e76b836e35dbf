"""Who says what is right: for each batch, what it thinks of any stretch of its positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmshrink.train.heads import Halves
from llmshrink.train.sparse import Sparse

# Of a stretch of positions: logits [rows, positions, vocabulary], or some tokens [rows x positions, k].
Words = Callable[[slice], Tensor] | Callable[[slice], Sparse]


class Teacher(Protocol):
    """Says what is right, without gradients."""

    vocabulary: int  # tokens that it has logits for

    def look(self, inputs: dict[str, Any]) -> Words:
        """What it says of a batch: `inputs` are those of a forward pass."""
        ...


class Online:
    """A model that is asked as the steps go."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model`: on the device of the student, which does not learn."""
        self._model, self._halves = model, Halves(model)
        self.vocabulary = self._halves.vocabulary

    @torch.no_grad()
    def look(self, inputs: dict[str, Any]) -> Words:
        """Run its body once, and its head for each stretch that is asked for."""
        state = self._halves.body(self._model, inputs)

        @torch.no_grad()
        def words(part: slice) -> Tensor:
            return self._halves.head(state[:, part])

        return words
