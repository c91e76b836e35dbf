"""Scores of a model with and without its adapter, from one copy of it in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from llmshrink.calibration.rows import Rows
from llmshrink.evaluate.metrics import Scores
from llmshrink.evaluate.texts import text_score
from llmshrink.progress import Progress
from llmshrink.report.schema import TextScore

Without = Callable[[], AbstractContextManager[object]]  # within it the model is as it was


@torch.no_grad()
def score_adapted(
    model: PreTrainedModel, without: Without, texts: list[Rows], *, packed: bool, progress: Progress
) -> tuple[list[TextScore], list[TextScore]]:
    """Perplexity without the adapter, and with it, and how far both are apart, on each text.

    Args:
        model: with its adapter.
        without: takes the adapter away.
        texts: rows of each.
        packed: how the rows were filled, for the protocol.
        progress: told of the tokens.
    """
    device = next(model.parameters()).device
    progress.start("evaluate", sum(text.count for text in texts))
    before, after = [], []
    for text in texts:
        scores = Scores(), Scores()
        for row in text.tokens:
            tokens = row[None].to(device)
            with without():
                reference = model(input_ids=tokens, use_cache=False).logits.float()
            logits = model(input_ids=tokens, use_cache=False).logits[:, -tokens.shape[1] :].float()
            scores[0].update(reference, tokens)
            scores[1].update(logits, tokens, reference)
            progress.advance(len(row))
        before.append(text_score(scores[0], text, packed))
        after.append(text_score(scores[1], text, packed))
    progress.finish()
    return before, after
