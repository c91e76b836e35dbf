"""Scores of one or two models on several texts, streamed block by block: neither model is ever in memory as a whole."""

from __future__ import annotations

import torch

from llmshrink.calibration.rows import Rows
from llmshrink.engine.hidden import Hidden
from llmshrink.evaluate.metrics import Scores
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Progress
from llmshrink.report.schema import TextScore


def score_texts(
    base: StreamedModel,
    model: StreamedModel | None,
    texts: list[Rows],
    *,
    packed: bool,
    batch_tokens: int,
    progress: Progress,
) -> tuple[list[TextScore], list[TextScore]]:
    """Perplexity of `base`, and of `model` with its divergence from `base`, on each text.

    Returns:
        The scores of `base` and those of `model` (empty where it is None), in the order of the texts.
    """
    batches = [(i, batch) for i, text in enumerate(texts) for batch in text.batches(batch_tokens)]
    models = [base] if model is None else [base, model]
    work = sum(text.count for text in texts) * len(base.anatomy.blocks) * len(models)
    progress.start("evaluate", work)
    states = []
    for one in models:
        hidden = Hidden(one, [batch for _, batch in batches])
        for block in one.anatomy.blocks:
            one.load_block(block.index)
            hidden.advance(block.index, progress.advance)
            one.drop_block(block.index)
        states.append(hidden.states)
    scores = [[Scores() for _ in texts] for _ in models]
    with torch.no_grad():
        for number, (text, tokens) in enumerate(batches):
            reference = base.logits(tokens, states[0][number])
            scores[0][text].update(reference, tokens)
            if model is not None:
                scores[1][text].update(model.logits(tokens, states[1][number]), tokens, reference)
    progress.finish()
    made = [[_text_score(s, text, packed) for s, text in zip(row, texts, strict=True)] for row in scores]
    return made[0], made[1] if model is not None else []


def _text_score(scores: Scores, text: Rows, packed: bool) -> TextScore:
    rows = "packed rows joined by BOS/EOS" if packed else "one document in each row, BOS first"
    return TextScore(
        dataset=text.data,
        fingerprint=text.fingerprint,
        rows=len(text.tokens),
        length=text.length,
        tokens=scores.tokens,
        protocol=f"token perplexity; {rows}, each scored on its own from its second token; float32 log-softmax; "
        f"{text.origin}",
        perplexity=scores.perplexity,
        kl=scores.kl,
        top1=scores.top1,
        tokens_rows=scores.tokens_rows,
        nll_rows=scores.nll_rows,
        kl_rows=scores.kl_rows,
    )
