"""Statistics gathered in pieces are what the definition gives at once."""

from __future__ import annotations

import pytest
import torch

from llmshrink.statistics import NARROW, NARROW_TILE, Cross, Hessian, Magnitude, Norm, NoStatistic, Range

CPU = torch.device("cpu")


def inputs(width: int, tokens: int = 40) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize("width", [1, 17, NARROW_TILE, NARROW_TILE + 1, 5 * NARROW_TILE + 40, NARROW + 40])
def test_hessian_is_the_mean_of_the_outer_products(width: int) -> None:
    x = inputs(width)
    found = Hessian(width, CPU)
    for part in x.split([7, 1, 32]):
        found.update(part)
    found.finish()
    expected = x.double().T @ x.double() / len(x)
    assert found.tokens == len(x)
    assert torch.equal(found.matrix, found.matrix.T)
    torch.testing.assert_close(found.matrix.double(), expected, rtol=1e-5, atol=1e-5)


def test_cross_is_a_hessian_and_the_mean_of_the_difference_times_the_input() -> None:
    x, y = inputs(9), inputs(9) + 0.1 * inputs(9).flip(0)
    found, hessian = Cross(9, CPU), Hessian(9, CPU)
    for part, original in zip(x.split(13), y.split(13), strict=True):
        found.pair(part, original)
        hessian.update(part)
    found.finish(), hessian.finish()
    assert found.tokens == len(x) and torch.equal(found.matrix, hessian.matrix)
    torch.testing.assert_close(found.shift.double(), (y - x).double().T @ x.double() / len(x), rtol=1e-5, atol=1e-6)


def test_norm_is_the_mean_square_of_each_feature() -> None:
    x = inputs(5)
    found = Norm(5, CPU)
    for part in x.split(11):
        found.update(part)
    found.finish()
    torch.testing.assert_close(found.square, (x**2).mean(0))
    assert found.tokens == len(x)


def test_magnitude_is_the_mean_magnitude_of_each_feature() -> None:
    x = inputs(5)
    found = Magnitude(5, CPU)
    for part in x.split([7, 33]):
        found.update(part)
    found.finish()
    assert found.tokens == 40 and torch.allclose(found.mean, x.abs().mean(0))


def test_range_counts_every_magnitude_in_the_bin_it_lies_in() -> None:
    x = inputs(7) * torch.logspace(-30, 4, 7)
    x[3, 2] = 0
    found = Range(7, CPU)
    for part in x.split([9, 1, 30]):
        found.update(part)
    found.finish()
    ends, middles, counts = found.bins()
    magnitudes = x.abs().flatten()
    assert (
        found.tokens == len(x) and int(counts.sum()) == x.numel() and torch.equal(found.largest, magnitudes.max()[None])
    )
    below = torch.cat([torch.zeros(1), ends[:-1]])
    for low, middle, high, count in zip(below, middles, ends, counts, strict=True):
        inside = (magnitudes >= low) & (magnitudes < high)
        assert int(inside.sum()) == int(count) > 0
        assert ((magnitudes[inside] - middle).abs() <= middle / 64).all() or low == 0


@pytest.mark.parametrize("kind", [Norm, Magnitude, Range, Hessian, Cross, NoStatistic])
def test_nothing_seen_is_zero_and_no_error(kind: type[Norm]) -> None:
    found = kind(4, CPU)
    found.finish()
    assert found.tokens == 0
    assert all(not value.any() for value in vars(found).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("kind", [Norm, Magnitude, Range, Hessian, Cross, NoStatistic])
def test_bytes_are_those_of_the_tensors(kind: type[Norm]) -> None:
    tensors = [value for value in vars(kind(48, CPU)).values() if isinstance(value, torch.Tensor)]
    assert kind.bytes(48) == sum(t.numel() * t.itemsize for t in tensors)


@pytest.mark.parametrize("kind", [Norm, Magnitude, Range, Hessian, Cross])
def test_inputs_are_not_changed(kind: type[Norm]) -> None:
    x = inputs(6)
    copy = x.clone()
    found = kind(6, CPU)
    found.update(x)
    found.finish()
    assert torch.equal(x, copy)
