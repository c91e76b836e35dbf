"""Scores of a model with its adapter, and of the original: the same one without it, where it is held as it was."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from llmshrink.calibration.rows import Rows
from llmshrink.evaluate.metrics import Scores
from llmshrink.evaluate.texts import text_score
from llmshrink.progress import Progress
from llmshrink.report.schema import TextScore


@torch.no_grad()
def score_adapted(
    model: PeftModel, original: PreTrainedModel | None, texts: list[Rows], *, packed: bool, progress: Progress
) -> tuple[list[TextScore], list[TextScore]]:
    """Perplexity without the adapter, and with it, and how far both are apart, on each text.

    Args:
        model: with its adapter.
        original: what it is compared with; None: itself, without the adapter.
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
            with nullcontext() if original is not None else model.disable_adapter():
                reference = (original or model)(input_ids=tokens, use_cache=False).logits.float()
            logits = model(input_ids=tokens, use_cache=False).logits[:, -tokens.shape[1] :].float()
            scores[0].update(reference, tokens)
            scores[1].update(logits, tokens, reference)
            progress.advance(len(row))
        before.append(text_score(scores[0], text, packed))
        after.append(text_score(scores[1], text, packed))
    progress.finish()
    return before, after
