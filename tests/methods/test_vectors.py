"""K-means of vectors against what is plain to see, and against its own parts."""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods.vectors import centres, nearest


def clouds(number: int, dim: int) -> tuple[Tensor, Tensor]:
    """Far apart, and many vectors close around them."""
    generator = torch.Generator().manual_seed(number)
    middles = 100 * torch.randn(number, dim, generator=generator)
    around = torch.randn(number, 50, dim, generator=generator)
    return middles, middles[:, None] + around - around.mean(1, keepdim=True)


def test_clouds_are_found() -> None:
    middles, vectors = clouds(16, 4)
    found = centres(vectors.view(-1, 4), None, 16)
    assert torch.cdist(middles, found).amin(1).max() < 1e-3


def test_weights_pull() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    weights = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    assert torch.allclose(centres(x, weights, 1), torch.tensor([[0.75, 0.25]]))


def test_the_nearest_is_that_of_all() -> None:
    generator = torch.Generator().manual_seed(1)
    x, table = torch.randn(300, 2, generator=generator), torch.randn(8, 2, generator=generator)
    weights = torch.rand(300, 2, generator=generator)
    costs = (weights[:, None] * (x[:, None] - table).square()).sum(2)
    codes, least = nearest(x, weights, table)
    assert torch.equal(codes, costs.argmin(1)) and torch.allclose(least, costs.amin(1), atol=1e-5)


def test_no_centre_is_lost_to_equal_vectors() -> None:
    x = torch.cat([torch.zeros(500, 2), torch.randn(12, 2, generator=torch.Generator().manual_seed(2))])
    codes, costs = nearest(x, None, centres(x, None, 13))
    assert float(costs.sum()) < 1e-6 and len(codes.unique()) == 13


def test_better_than_values_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4096, 2, generator=generator)
    alone = 0.1175  # of a Gaussian in 4 values (Max 1960, table I)
    costs = nearest(x, None, centres(x, None, 16))[1]
    assert float(costs.mean()) / 2 < 0.95 * alone
