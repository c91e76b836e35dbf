"""Who says what is right: for each batch, what it thinks of any stretch of its positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llmshrink.model.task import positions
from llmshrink.train.alignment import Alignment
from llmshrink.train.heads import Halves
from llmshrink.train.sparse import Sparse
from llmshrink.train.uld import SILENT

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
        self.model, self._halves = model, Halves(model)
        self.places: Tensor | None = None  # of the student's positions among its own; None: they are the same
        self.vocabulary = self._halves.vocabulary

    @torch.no_grad()
    def look(self, inputs: dict[str, Any]) -> Words:
        """Run its body once, and its head for each stretch that is asked for."""
        state = self._halves.body(self.model, inputs)

        @torch.no_grad()
        def words(part: slice) -> Tensor:
            return self._halves.head(state[:, part])

        return words


class Foreign(Online):
    """A model that reads the same text in its own tokens, and speaks where one ends that ends one of the student's.

    Attributes:
        seen: Positions of the student that it was asked about, and at how many of these it could speak.
    """

    def __init__(self, model: PreTrainedModel, alignment: Alignment) -> None:
        """`alignment`: of both tokenizers."""
        super().__init__(model)
        self._alignment = alignment
        self.seen = torch.zeros(2, dtype=torch.long)

    @torch.no_grad()
    def look(self, inputs: dict[str, Any]) -> Words:
        """Read the text, run the body once, and the head for the positions that both have of a stretch."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        others = self._read(ids, torch.ones_like(ids) if mask is None else mask)
        state, places = self._halves.body(self.model, others), self.places
        assert places is not None

        @torch.no_grad()
        def words(part: slice) -> Tensor:
            known = places[:, part] >= 0
            logits = state.new_full((*known.shape, self.vocabulary), SILENT, dtype=torch.float32)
            if known.any():
                rows = known.nonzero(as_tuple=True)[0]
                logits[known] = self._halves.head(state[rows, places[:, part][known]][None])[0].float()
            return logits

        return words

    def _read(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Its own inputs for rows of the student's; what no position of its own is left for is not read."""
        found = [self._alignment.row(row[seen.bool()].tolist()) for row, seen in zip(ids, mask, strict=True)]
        limit = positions(self.model)
        rows = [torch.tensor(made[:limit] or [0], device=ids.device) for made, _ in found]
        self.places = torch.full_like(ids, -1)
        for row, (_, places) in enumerate(found):
            known = torch.tensor(places, device=ids.device)
            self.places[row, mask[row].bool()] = known.where(known < len(rows[row]), -1)
        self.seen += torch.tensor([int(mask.sum()), int((self.places >= 0).sum())])
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }
