"""Scores of streamed models against transformers running the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmshrink.calibration.rows import Rows
from llmshrink.evaluate import texts
from llmshrink.evaluate.metrics import Scores
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent


@pytest.mark.parametrize("logits", [1, 1 << 26])
def test_scores_equal_those_of_the_whole_model(
    models_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, logits: int
) -> None:
    """Whether the logits of all positions are computed together, or of one position after another."""
    monkeypatch.setattr(texts, "LOGITS", logits)
    folder = models_folder("llama")
    generator = torch.Generator().manual_seed(0)
    found = [Rows(tuple(torch.randint(90, (3, 12), generator=generator)), name, name) for name in ("one", "two")]
    streamed = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first, second = texts.score_texts(streamed, streamed, found, packed=True, batch_tokens=24, progress=Silent())
    for text, score, same in zip(found, first, second, strict=True):
        expected = Scores()
        tokens = torch.stack(list(text.tokens))
        with torch.no_grad():
            expected.update(whole(tokens).logits, tokens)
        assert score.nll_rows == pytest.approx(expected.nll_rows, rel=1e-5)
        assert score.tokens_rows == [11] * 3 and score.kl is None
        assert same.nll_rows == score.nll_rows and same.kl == 0 and same.top1 == 1
