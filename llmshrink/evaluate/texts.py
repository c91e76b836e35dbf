"""Scores of one or two models on several texts, streamed block by block: neither model is ever in memory as a whole."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmshrink.calibration.rows import Rows
from llmshrink.engine.hidden import Hidden
from llmshrink.evaluate.agreement import Agreement
from llmshrink.evaluate.metrics import Scores
from llmshrink.memory import trim
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.task import Task
from llmshrink.plan.economy import Economy
from llmshrink.progress import Progress
from llmshrink.report.schema import TextScore


def score_texts(
    base: StreamedModel,
    model: StreamedModel | None,
    texts: list[Rows],
    *,
    packed: bool,
    economy: Economy,
    folder: Path,
    progress: Progress,
) -> tuple[list[TextScore], list[TextScore]]:
    """Perplexity of `base`, and of `model` with its divergence from `base`, on each text.

    Models that predict no next token have no perplexity: `model` is compared with `base`, which has no score itself.

    Args:
        base: the original.
        model: what is compared with it, if anything.
        texts: rows of each text.
        packed: how the rows were filled, for the protocol.
        economy: how much is in memory at a time.
        folder: for hidden states, where the economy keeps them on disk.
        progress: told of the steps.

    Returns:
        The scores of `base` and those of `model` (empty where it is None), in the order of the texts.
    """
    models = [base] if model is None else [base, model]
    if len(models) == 1 and not base.task.causal:
        return [], []
    progress.start("evaluate", sum(text.count for text in texts) * len(base.anatomy.blocks) * len(models))
    made: list[list[TextScore]] = [[] for _ in models]
    for text in texts:  # one after another: the states of all would be in memory together
        batches = text.batches(economy.batch_tokens)
        states = [last_states(one, batches, folder if economy.on_disk else None, progress) for one in models]
        if base.task.causal:
            scores = [Scores() for _ in models]
            for tokens, *ends in zip(batches, *states, strict=True):
                score_batch(models, ends, tokens, scores, economy.logits)
            for row, found in zip(made, scores, strict=True):
                row.append(text_score(found, text, packed))
        else:
            agreement = Agreement(distribution=base.distribution)
            for tokens, *ends in zip(batches, *states, strict=True):
                compare_batch(models, ends, tokens, agreement, economy.logits)
            made[1].append(_agreement(agreement, text, packed, base.task))
    progress.finish()
    return made[0], made[1] if model is not None else []


def last_states(model: StreamedModel, batches: list[Tensor], folder: Path | None, progress: Progress) -> list[Tensor]:
    """What leaves the last block, for each batch; one block at a time is in memory.

    Args:
        model: whose blocks the tokens go through.
        batches: token ids [rows, length] of each.
        folder: for the states, in files that vanish with the process; None: in the device's memory.
        progress: told of the tokens of each batch, for each block.
    """
    hidden = Hidden(model, batches, folder=folder)
    for block in model.anatomy.blocks:
        model.load_block(block.index)
        hidden.advance(block.index, progress.advance)
        model.drop_block(block.index)
        trim()
    return hidden.states


@torch.no_grad()
def score_batch(
    models: list[StreamedModel], ends: list[Tensor], tokens: Tensor, scores: list[Scores], logits: int
) -> None:
    """Add a batch to the scores, a stretch of positions at a time; the first model is the others' reference."""
    stretch = max(1, logits // (len(tokens) * models[0].vocabulary * 4))
    shared = min(model.vocabulary for model in models)  # what one has more is padding: they read the same tokens
    for one in scores:
        one.begin(len(tokens))
    for start in range(0, tokens.shape[1] - 1, stretch):
        part = slice(start, min(start + stretch, tokens.shape[1] - 1))
        targets = tokens[:, part.start + 1 : part.stop + 1]
        reference = models[0].output(tokens[:, part], ends[0][:, part])[..., :shared]
        scores[0].add(reference, targets)
        for model, end, score in zip(models[1:], ends[1:], scores[1:], strict=True):
            score.add(model.output(tokens[:, part], end[:, part])[..., :shared], targets, reference)


@torch.no_grad()
def compare_batch(
    models: list[StreamedModel], ends: list[Tensor], tokens: Tensor, agreement: Agreement, logits: int
) -> None:
    """Add a batch of the second model's output beside the first's; a stretch at a time, where tokens have results."""
    original, model = models
    length = tokens.shape[1]
    stretch = length if model.task.by_row else max(1, logits // (len(tokens) * model.width * 4))
    agreement.begin(len(tokens))
    for start in range(0, length, stretch):
        part = slice(start, start + stretch)
        reference, output = (one.output(tokens[:, part], end[:, part]) for one, end in zip(models, ends, strict=True))
        agreement.add(output, reference)


def text_score(scores: Scores, text: Rows, packed: bool) -> TextScore:
    """What was found on a text, with its protocol; `packed`: how its rows were filled."""
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


def _agreement(agreement: Agreement, text: Rows, packed: bool, task: Task) -> TextScore:
    rows = "packed rows" if packed else "one document in each row"
    of = "row" if task.by_row else "token"
    return TextScore(
        dataset=text.data,
        fingerprint=text.fingerprint,
        rows=len(text.tokens),
        length=text.length,
        tokens=text.count,
        protocol=f"{task.gives} of every {of} beside the original's, no token masked; {rows}, within the tokens that "
        f"the tokenizer puts around a text; {text.origin}",
        kl=agreement.kl,
        top1=agreement.top1,
        cosine=agreement.cosine,
        relative_error=agreement.relative_error,
        tokens_rows=agreement.results_rows,
        kl_rows=agreement.kl_rows,
    )
