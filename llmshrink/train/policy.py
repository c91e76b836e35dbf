"""Rows in the student's own words, so that it learns where it goes by itself: on-policy distillation.

GKD (Agarwal et al. 2024, arXiv 2306.13649, algorithm 1): with some probability a batch is replaced by what the student
as it is now goes on with, and the divergence is summed over that; no gradient passes through the drawing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from llmshrink.recipe.modes import PolicySpec

IGNORED = -100  # in labels: does not count
APART = 1_000_003  # between the seeds of two batches


class Policy:
    """Draws rows from a student."""

    def __init__(self, model: PreTrainedModel, spec: PolicySpec, seed: int) -> None:
        """`model`: that learns, without what wraps it."""
        self._model, self._spec, self._seed = model, spec, seed
        ends = model.generation_config.eos_token_id if model.generation_config else None
        self._ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=model.device).flatten()

    def rows(self, batch: dict[str, Any], number: int, rank: int = 0) -> dict[str, Any]:
        """A batch as it is, or in the student's words; which one, and these, follow from its number.

        Args:
            batch: `input_ids` and `labels` [rows, length], int64, and an `attention_mask` where rows are padded.
            number: of the batch in the whole training, so that a run that goes on draws the same.
            rank: of this process: which batch it is is decided for all alike.
        """
        seed = self._seed + APART * number
        chance = torch.rand((), generator=torch.Generator().manual_seed(seed))
        if chance >= self._spec.share:
            return batch
        device = self._model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed + rank)
            return self._continued(batch["input_ids"], batch["labels"], batch.get("attention_mask"))

    def _continued(self, ids: Tensor, labels: Tensor, mask: Tensor | None) -> dict[str, Any]:
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        # Tokens in front that do not count; the first of a row never does, as nothing stands before it.
        silent = [int((row[1:] == IGNORED).long().cumprod(0).sum()) for row in labels]
        asked = [count and count + 1 for count in silent]
        kept = [
            min(length - 1, first or max(1, round(self._spec.prompt * length)))
            for first, length in zip(asked, lengths, strict=True)
        ]
        prompts = [row[:first] for row, first in zip(ids, kept, strict=True)]
        drawn = self._drawn(prompts, ids.shape[1] - max(kept), ends=all(asked))
        answers = [self._whole(new) if first else new for new, first in zip(drawn, asked, strict=True)]
        found = list(zip(prompts, answers, strict=True))
        rows = [torch.cat(pair) for pair in found]
        counted = [torch.cat([torch.full_like(prompt, IGNORED), new]) for prompt, new in found]
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "labels": pad_sequence(counted, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "drawn": True,
        }

    @torch.no_grad()
    def _drawn(self, prompts: list[Tensor], room: int, *, ends: bool) -> Tensor:
        """Tokens [rows, new] that the student goes on with; rows without an end of their own go on behind one."""
        count = min(room, self._spec.tokens or room)
        padded = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
        with _sampling(self._model):
            out: Tensor = self._model.generate(
                padded,
                attention_mask=mask,
                do_sample=True,
                temperature=self._spec.temperature,
                top_k=0,
                top_p=1.0,
                min_new_tokens=0 if ends else count,
                max_new_tokens=count,
                eos_token_id=self._ends.tolist() or None if ends else None,
                pad_token_id=0,
            )
        return out[:, padded.shape[1] :]

    def _whole(self, new: Tensor) -> Tensor:
        """An answer up to its end."""
        ended = torch.isin(new, self._ends).nonzero()
        return new if not len(ended) else new[: int(ended[0]) + 1]


@contextmanager
def _sampling(model: PreTrainedModel) -> Iterator[None]:
    """A model that draws from its own distribution: no dropout, and no penalties of its configuration."""
    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)
