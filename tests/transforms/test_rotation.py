"""Rotations against the matrices that they stand for."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard

from llmshrink.transforms.rotation import Rotation

WIDTHS = [1, 2, 16, 64, 12, 60, 7, 96]


def explicit(rotation: Rotation) -> torch.Tensor:
    """Q, from the identity."""
    return rotation.produced(torch.eye(rotation.width, dtype=torch.float64))


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal_and_mixes_all_channels(width: int) -> None:
    q = explicit(Rotation(width, 4))
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64))
    assert bool((q.abs() > 1e-6).all())


@pytest.mark.parametrize("width", [2, 16, 64])
def test_of_a_power_of_two_it_is_the_hadamard_matrix_with_signs(width: int) -> None:
    q, signs = explicit(Rotation(width, 4)), Rotation(width, 4)._signs
    expected = signs[:, None] * torch.tensor(hadamard(width)) / width**0.5
    torch.testing.assert_close(q, expected)


def test_of_another_width_it_is_a_kronecker_product() -> None:
    rotation = Rotation(12, 4)
    expected = torch.kron(torch.tensor(hadamard(4), dtype=torch.float64) / 2, rotation._odd.contiguous())
    torch.testing.assert_close(explicit(rotation), rotation._signs[:, None] * expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_back_gives_what_was_turned(width: int) -> None:
    x = torch.randn(5, 3, 2 * width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = Rotation(width, 4)
    torch.testing.assert_close(rotation.back(rotation.produced(x)), x)
    by_head = x.view(5, 3, 2, width) @ explicit(rotation)
    torch.testing.assert_close(rotation.produced(x), by_head.view(x.shape))


@pytest.mark.parametrize("width", [64, 96, 60])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(width: int) -> None:
    x = torch.randn(37, width, generator=torch.Generator().manual_seed(1))
    rotation = Rotation(width, 4)
    whole = rotation.produced(x)
    for start, stop in ((0, 1), (3, 20), (36, 37)):
        assert torch.equal(rotation.produced(x[start:stop]), whole[start:stop])


def test_seeds_differ_and_repeat() -> None:
    assert torch.equal(explicit(Rotation(24, 1)), explicit(Rotation(24, 1)))
    assert not torch.equal(explicit(Rotation(24, 1)), explicit(Rotation(24, 2)))
