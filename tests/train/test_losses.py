"""Divergences against sums over the vocabulary, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmshrink.recipe.distill import LossSpec
from llmshrink.train.losses import divergence, mixed

TOKENS, WIDTH = 7, 11


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def chances(values: Tensor, temperature: float) -> list[list[float]]:
    rows = []
    for row in values.double().tolist():
        powers = [math.exp(value / temperature) for value in row]
        rows.append([power / sum(powers) for power in powers])
    return rows


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def brute(student: Tensor, teacher: Tensor, spec: LossSpec) -> list[float]:
    found = []
    for q, p in zip(chances(student, spec.temperature), chances(teacher, spec.temperature), strict=True):
        if spec.name == "kl":
            value = kl(p, q)
        elif spec.name == "reverse-kl":
            value = kl(q, p)
        else:
            m = [spec.beta * a + (1 - spec.beta) * b for a, b in zip(p, q, strict=True)]
            value = spec.beta * kl(p, m) + (1 - spec.beta) * kl(q, m)
        found.append(value * spec.temperature**2)
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["kl", "reverse-kl", "jsd"])
def test_a_divergence_is_its_sum_over_the_vocabulary(name: str, temperature: float) -> None:
    spec = LossSpec.model_validate({"name": name, "temperature": temperature, "beta": 0.3})
    found = divergence(logits(1), logits(2), spec)
    assert found.tolist() == pytest.approx(brute(logits(1), logits(2), spec), rel=1e-5)
    assert divergence(logits(1), logits(1), spec).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["kl", "reverse-kl", "jsd"])
def test_only_tokens_that_are_labelled_count(name: str) -> None:
    spec = LossSpec.model_validate({"name": name, "alpha": 0.25})
    labels = torch.tensor([3, -100, 0, 10, -100, -100, 5])
    counted = [i for i, label in enumerate(labels.tolist()) if label != -100]
    far = brute(logits(1), logits(2), spec)
    entropy = [-math.log(chances(logits(1), 1)[i][labels[i]]) for i in counted]
    wanted = 0.25 * sum(far[i] for i in counted) + 0.75 * sum(entropy)
    assert float(mixed(logits(1), logits(2), labels, spec)) == pytest.approx(wanted, rel=1e-5)
    alone = float(mixed(logits(1), None, labels, spec))
    assert alone == pytest.approx(sum(entropy), rel=1e-5)
    assert float(mixed(logits(1), logits(2), labels, LossSpec(alpha=0))) == pytest.approx(alone)


def test_gradients_are_as_large_at_any_temperature() -> None:
    """Of logits near each other, T^2 takes back what softening took: Hinton's limit."""
    sizes = []
    for temperature in (10.0, 100.0):
        student = (0.1 * logits(1)).requires_grad_()
        divergence(student, 0.1 * logits(2), LossSpec(temperature=temperature)).sum().backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
