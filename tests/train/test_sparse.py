"""A distribution in a few tokens: every draw that there can be, and sums over the vocabulary in double precision."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llmshrink.train import sparse
from llmshrink.train.sparse import Sparse, divergence, drawn, likeliest

WIDTH = 9


def logits(seed: int, rows: int = 1, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def chances(values: Tensor, temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in values.double().flatten().tolist()]
    return [power / sum(powers) for power in powers]


def threshold(p: list[float], count: int) -> float:
    """By halving: sum of min(1, p / t) is the count."""
    low, high = 1e-12, 1.0
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if sum(min(1, x / middle) for x in p) > count else (low, middle)
    return low


def every_draw(values: Tensor, count: int, temperature: float) -> list[tuple[float, Sparse]]:
    """All draws that there can be, each with its chance: what is drawn changes at few numbers alone."""
    p = chances(values, temperature)
    t = threshold(p, count)
    sums, total = [0.0, 1.0], 0.0
    for x in p:
        total += x / t if x < t else 0.0
        sums.append(total % 1)
    found = []
    for one, other in pairwise(sorted(sums)):
        if other - one > 1e-9:
            middle = torch.tensor([(one + other) / 2], dtype=torch.float64)
            found.append((other - one, drawn(values, count, temperature, middle)))
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_over_all_draws_the_gradient_is_that_of_all_tokens(count: int, temperature: float) -> None:
    teacher, student = logits(1), logits(2).requires_grad_()
    p, q = chances(teacher, temperature), chances(student.detach(), temperature)
    value, gradient, total = 0.0, torch.zeros(WIDTH), 0.0
    draws = every_draw(teacher, count, temperature)
    assert len(draws) > 1
    for weight, words in draws:
        found = divergence(student, words, temperature).sum()
        gradient += weight * torch.autograd.grad(found, student)[0][0]
        value, total = value + weight * float(found.detach()), total + weight
        assert len(set(words.tokens[0].tolist())) == count
        logs, stands = words.at(temperature)
        assert float((stands * logs.exp()).sum()) == pytest.approx(1, abs=1e-5)
    assert total == pytest.approx(1)
    assert value == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=2e-5)
    right = [(b - a) / temperature for a, b in zip(p, q, strict=True)]
    assert gradient.tolist() == pytest.approx(right, abs=2e-5)


def test_what_is_measured_needs_no_other_sample() -> None:
    teacher, student = logits(1), logits(2)
    p, q = chances(teacher), chances(student)
    value = sum(w * float(divergence(student, words, 1.0)) for w, words in every_draw(teacher, 4, 2.0))
    assert value == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=2e-5)


@pytest.mark.parametrize("least", [True, False])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_what_is_likely_is_always_kept(count: int, least: bool) -> None:
    teacher = logits(3, rows=50, spread=4.0)
    uniform = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (not least)
    words = drawn(teacher, count, 1.0, uniform)
    for row, kept, limit in zip(teacher, words.tokens.tolist(), words.threshold.exp().tolist(), strict=True):
        p = chances(row)
        right = threshold(p, count)
        assert len(set(kept)) == count
        assert limit == pytest.approx(right, rel=1e-4)
        assert {i for i, x in enumerate(p) if x > right * (1 + 1e-6)} <= set(kept)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("count", [1, 4, WIDTH, 20])
def test_the_likeliest_and_one_for_the_rest(count: int, temperature: float) -> None:
    teacher, student = logits(4, rows=6), logits(5, rows=6)
    found = divergence(student, likeliest(teacher, count, temperature), temperature)
    for value, one, other in zip(found.tolist(), teacher, student, strict=True):
        pairs = sorted(zip(chances(one, temperature), chances(other, temperature), strict=True), reverse=True)
        whole = sum(a * math.log(a / b) for a, b in pairs)
        kept, rest = pairs[:count], [sum(x) for x in zip(*pairs[count:], strict=True)]
        right = sum(a * math.log(a / b) for a, b in [*kept, *([rest] if rest else [])])
        assert value == pytest.approx(right, abs=1e-5) and value <= whole + 1e-5


@pytest.mark.parametrize("count", [WIDTH, 20])
def test_all_tokens_are_no_sample(count: int) -> None:
    teacher, student = logits(6, rows=3), logits(7, rows=3)
    words = drawn(teacher, count, 1.0, torch.zeros(3, dtype=torch.float64))
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    assert torch.allclose(divergence(student, words, 1.0), (p.exp() * (p - q)).sum(-1), atol=1e-5)


def test_a_teacher_who_is_certain_leaves_numbers() -> None:
    teacher = torch.full((2, WIDTH), -torch.inf)
    teacher[:, 3] = 0.0
    teacher[1, 4] = -200.0
    for words in (drawn(teacher, 4, 1.0, torch.full((2,), 0.999, dtype=torch.float64)), likeliest(teacher, 4, 1.0)):
        kept = Sparse(words.tokens, words.logs.clamp(min=-1e4), words.shift, words.threshold, 1.0, words.rest)
        student = logits(8, rows=2).requires_grad_()
        found = divergence(student, kept, 1.0)
        assert torch.allclose(found, -student.log_softmax(-1)[:, 3], atol=1e-4)
        assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()


def beside(words: Sparse, others: Sparse) -> Sparse:
    names = ("tokens", "logs", "shift", "threshold")
    return Sparse(*(torch.cat([getattr(words, n), getattr(others, n)]) for n in names), words.temperature, words.rest)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_student_s_own_tail_steadies_the_draw(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    teacher, others = logits(1), logits(3, rows=30)
    student = logits(2, rows=31, spread=0.3) + torch.cat([teacher, others])
    student.requires_grad_()
    uniform = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fixed = drawn(others, 3, temperature, uniform)
    right = ((student[:1] / temperature).softmax(-1) - (teacher / temperature).softmax(-1)).detach() / temperature
    noise = []
    for share in (sparse._share, lambda ratio, drawn, mass: torch.zeros_like(mass)):
        monkeypatch.setattr(sparse, "_share", share)
        found = []
        for weight, words in every_draw(teacher, 3, temperature):
            loss = divergence(student, beside(words, fixed), temperature).sum()
            found.append((weight, torch.autograd.grad(loss, student)[0][:1]))
        assert torch.allclose(sum(weight * gradient for weight, gradient in found), right, atol=2e-5)  # type: ignore[arg-type]
        noise.append(sum(weight * float((gradient - right).square().sum()) for weight, gradient in found))
    assert noise[0] < 0.15 * noise[1]


def test_as_much_is_taken_from_the_student_as_is_best() -> None:
    ratio, drawn = 0.2 + torch.rand(500, 8, generator=torch.Generator().manual_seed(4)), torch.ones(500, 8) > 0
    ratio /= ratio.mean()
    found = sparse._share(ratio, drawn, torch.full((500, 1), 0.3))
    noise = {a / 100: float((1 - a / 100 * ratio).square().mean()) for a in range(101)}
    assert float(found.mean()) == pytest.approx(min(noise, key=noise.__getitem__), abs=0.01)
    assert found.std() < 0.01
    assert float(sparse._share(ratio[:1], drawn[:1], torch.full((1, 1), 0.3))) == pytest.approx(0.5)
