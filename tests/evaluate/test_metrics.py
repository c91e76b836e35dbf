"""Scores against a computation in float64 that keeps everything in memory."""

import math
import sys

import pytest
import torch
from torch import Tensor

from llmshrink.errors import InputError
from llmshrink.evaluate import metrics
from llmshrink.evaluate.metrics import Scores, bootstrap_ratio

ROWS, LENGTH, VOCABULARY = 3, 11, 37


def batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model, reference = torch.randn(2, ROWS, LENGTH, VOCABULARY, generator=generator).mul(3).to(dtype)
    return model, torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator), reference


def brute_force(model: Tensor, tokens: Tensor, reference: Tensor) -> tuple[list[float], list[float], list[int]]:
    nll, kl, same = [], [], []
    for row in range(len(tokens)):
        sums = [0.0, 0.0, 0]
        for t in range(tokens.shape[1] - 1):
            p, q = reference[row, t].double().softmax(0), model[row, t].double().softmax(0)
            sums[0] -= math.log(q[tokens[row, t + 1]])
            sums[1] += sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True))
            sums[2] += int(p.argmax() == q.argmax())
        nll.append(sums[0])
        kl.append(sums[1])
        same.append(int(sums[2]))
    return nll, kl, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 10_000])
def test_scores_equal_brute_force(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk_tokens: int) -> None:
    monkeypatch.setattr(metrics, "CHUNK_BYTES", 4 * VOCABULARY * chunk_tokens)
    scores, expected = Scores(), [[], [], []]  # type: ignore[var-annotated]
    for seed in (0, 1):
        model, tokens, reference = batch(seed, dtype)
        kept = [t.clone() for t in (model, tokens, reference)]
        scores.update(model, tokens, reference)
        assert all(map(torch.equal, kept, (model, tokens, reference)))
        for rows, new in zip(expected, brute_force(model, tokens, reference), strict=True):
            rows += new
    count = 2 * ROWS * (LENGTH - 1)
    assert scores.tokens == count and scores.tokens_rows == [LENGTH - 1] * 2 * ROWS
    assert scores.nll_rows == pytest.approx(expected[0], rel=1e-6)
    assert scores.kl_rows == pytest.approx(expected[1], rel=1e-5)
    assert scores.top1_rows == expected[2]
    assert scores.perplexity == pytest.approx(math.exp(sum(expected[0]) / count), rel=1e-6)
    assert scores.kl == pytest.approx(sum(expected[1]) / count, rel=1e-5)
    assert scores.top1 == sum(expected[2]) / count


@pytest.mark.parametrize("stretch", [1, 4, 9])
def test_rows_may_come_in_stretches(stretch: int) -> None:
    whole, parts = Scores(), Scores()
    for seed in (0, 1):
        model, tokens, reference = batch(seed)
        whole.update(model, tokens, reference)
        parts.begin(ROWS)
        for start in range(0, LENGTH - 1, stretch):
            stop = min(start + stretch, LENGTH - 1)
            parts.add(model[:, start:stop], tokens[:, start + 1 : stop + 1], reference[:, start:stop])
    assert parts.tokens_rows == whole.tokens_rows and parts.top1_rows == whole.top1_rows
    assert parts.nll_rows == pytest.approx(whole.nll_rows) and parts.kl_rows == pytest.approx(whole.kl_rows)


def test_the_original_is_at_no_distance_from_itself() -> None:
    model, tokens, _ = batch(0)
    scores = Scores()
    scores.update(model, tokens, model)
    assert (scores.kl, scores.top1) == (0.0, 1.0)


def test_without_a_reference_there_is_no_divergence() -> None:
    model, tokens, reference = batch(0)
    scores = Scores()
    scores.update(model, tokens)
    assert (scores.kl, scores.top1, scores.kl_rows) == (None, None, [])
    with pytest.raises(InputError, match="some batches only"):
        scores.update(model, tokens, reference)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["model", "reference"])
def test_logits_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch, value: float, whose: str) -> None:
    monkeypatch.setattr(metrics, "CHUNK_BYTES", 4 * VOCABULARY * 3)
    model, tokens, reference = batch(0)
    (model if whose == "model" else reference)[2, 7, 5] = value
    with pytest.raises(InputError, match=f"the {whose} are not finite at row 2, position 7"):
        Scores().update(model, tokens, reference)


def test_a_row_of_one_token_is_refused() -> None:
    model, tokens, _ = batch(0)
    with pytest.raises(InputError, match="at least 2"):
        Scores().update(model[:, :1], tokens[:, :1])


def test_perplexity_does_not_overflow() -> None:
    logits = torch.zeros(1, 2, 2)
    logits[0, 0, 0] = 1e6
    scores = Scores()
    scores.update(logits, torch.tensor([[0, 1]]))
    assert scores.perplexity == sys.float_info.max


def test_bootstrap_is_paired_and_covers_the_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    b = (1 + 5 * torch.rand(64, generator=generator)).tolist()
    assert bootstrap_ratio([0.5 * x for x in b], b) == pytest.approx((0.5, 0.5, 0.5))  # unpaired, it would be wide
    a = [x * y for x, y in zip(b, (0.8 + 0.4 * torch.rand(64, generator=generator)).tolist(), strict=True)]
    ratio, low, high = bootstrap_ratio(a, b, seed=1)
    assert ratio == pytest.approx(sum(a) / sum(b)) and low < ratio < high and high - low < 0.1
    assert bootstrap_ratio(a, b, seed=1) == (ratio, low, high) != bootstrap_ratio(a, b, seed=2)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], []), ([1.0], [0.0])])
def test_bootstrap_refuses_rows_that_do_not_pair(a: list[float], b: list[float]) -> None:
    with pytest.raises(InputError):
        bootstrap_ratio(a, b)
