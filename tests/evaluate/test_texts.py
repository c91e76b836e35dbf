"""Scores of streamed models against transformers running the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import load
from transformers import AutoModelForCausalLM

from llmshrink.calibration.rows import Rows
from llmshrink.evaluate import texts
from llmshrink.evaluate.agreement import Agreement
from llmshrink.evaluate.metrics import Scores
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.economy import Economy
from llmshrink.progress import Silent


@pytest.mark.parametrize("logits", [1, 1 << 26])
@pytest.mark.parametrize("on_disk", [False, True])
def test_scores_equal_those_of_the_whole_model(
    models_folder: Callable[..., Path], tmp_path: Path, logits: int, on_disk: bool
) -> None:
    """Whether the logits of all positions are computed together, or of one position after another."""
    folder = models_folder("llama")
    generator = torch.Generator().manual_seed(0)
    found = [Rows(tuple(torch.randint(90, (3, 12), generator=generator)), name, name) for name in ("one", "two")]
    streamed = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = {"packed": True, "economy": Economy(24, logits, on_disk), "folder": tmp_path, "progress": Silent()}
    first, second = texts.score_texts(streamed, streamed, found, **settings)
    assert not any(tmp_path.iterdir())
    for text, score, same in zip(found, first, second, strict=True):
        expected = Scores()
        tokens = torch.stack(list(text.tokens))
        with torch.no_grad():
            expected.update(whole(tokens).logits, tokens)
        assert score.nll_rows == pytest.approx(expected.nll_rows, rel=1e-5)
        assert score.tokens_rows == [11] * 3 and score.kl is None
        assert same.nll_rows == score.nll_rows and same.kl == 0 and same.top1 == 1


@pytest.mark.parametrize("logits", [1, 1 << 26])
@pytest.mark.parametrize("family", ["bert", "bert-masked", "bert-classes", "xlm-roberta-tokens"])
def test_encoders_are_compared_as_whole_models_would_be(
    models_folder: Callable[..., Path], tmp_path: Path, family: str, logits: int
) -> None:
    rows = Rows(tuple(torch.randint(5, 160, (3, 12), generator=torch.Generator().manual_seed(0))), "t", "t")
    original, moved = load(models_folder(family))[0], load(models_folder(family))[0]
    with torch.no_grad():
        for parameter in moved.base_model.encoder.parameters():
            parameter.mul_(1.05)
    moved.save_pretrained(tmp_path)
    base, model = (
        StreamedModel(open_source(str(folder)), torch.device("cpu")) for folder in (models_folder(family), tmp_path)
    )
    settings = {"packed": True, "economy": Economy(24, logits), "folder": tmp_path, "progress": Silent()}
    none, (score,) = texts.score_texts(base, model, [rows], **settings)
    assert none == [] and texts.score_texts(base, None, [rows], **settings) == ([], [])
    tokens = torch.stack(list(rows.tokens))
    with torch.no_grad():
        a, b = (base.task.output(m(tokens)) for m in (moved, original))
    expected = Agreement(distribution=family != "bert")
    expected.begin(3)
    expected.add(a, b)
    for name in ("kl", "top1", "cosine", "relative_error"):
        found, wanted = getattr(score, name), getattr(expected, name)
        assert (found is None) == (wanted is None)
        assert found is None or found == pytest.approx(wanted, rel=1e-4), name
    assert (score.kl or score.relative_error or 0) > 1e-3
    assert score.tokens_rows == ([1] * 3 if family == "bert-classes" else [12] * 3) and score.tokens == 36
