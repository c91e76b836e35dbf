"""Agreement of two outputs against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from llmshrink.errors import InputError
from llmshrink.evaluate.agreement import Agreement


def pair(width: int, rows: int = 4, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(rows, length, width, generator=generator)
    return original + 0.3 * torch.randn(rows, length, width, generator=generator), original


def measured(output: torch.Tensor, original: torch.Tensor, *, distribution: bool, stretch: int) -> Agreement:
    found = Agreement(distribution=distribution)
    for batch in (slice(0, 3), slice(3, None)):
        found.begin(len(output[batch]))
        for part in torch.arange(output.shape[1]).split(stretch):
            found.add(output[batch][:, part], original[batch][:, part])
    return found


@pytest.mark.parametrize("stretch", [6, 4, 1])
def test_distributions_by_their_divergence(stretch: int) -> None:
    output, original = pair(5)
    found = measured(output, original, distribution=True, stretch=stretch)
    q, p = output.double().softmax(-1), original.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert found.results == 24 and found.results_rows == [6] * 4
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl_rows == pytest.approx(kl.sum(-1).tolist(), rel=1e-5)
    assert found.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean()) and 0 < found.top1 < 1
    assert found.cosine is None and found.relative_error is None


@pytest.mark.parametrize("stretch", [6, 4, 1])
def test_vectors_by_their_angle_and_distance(stretch: int) -> None:
    output, original = (tensor.double() for tensor in pair(16))
    found = measured(output, original, distribution=False, stretch=stretch)
    cosine = (output * original).sum(-1) / (output.norm(dim=-1) * original.norm(dim=-1))
    assert found.cosine == pytest.approx(float(cosine.mean()), rel=1e-12)
    assert found.relative_error == pytest.approx(float((output - original).norm() / original.norm()), rel=1e-12)
    assert found.kl is None and found.top1 is None and found.kl_rows == []


def test_single_numbers_have_no_angle() -> None:
    found = measured(*pair(1), distribution=False, stretch=6)
    assert found.cosine is None and found.relative_error is not None and found.relative_error > 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["the model", "the original"])
def test_an_output_that_is_not_finite_is_named(value: float, whose: str) -> None:
    output, original = pair(3)
    (output if whose == "the model" else original)[2, 1, 0] = value
    with pytest.raises(InputError, match=f"{whose} is not finite in row 2"):
        measured(output, original, distribution=True, stretch=6)
