# ruff: noqa: N803, N806 - W and H are the papers' symbols
"""One matrix in place of several, against least squares over all their inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from correlated import WIDTH, hessian
from torch import Tensor

from llmshrink.forms import Dense, LowRank, check_blocks, decode
from llmshrink.methods.basis import Place
from llmshrink.methods.metric import Metric
from llmshrink.methods.tie import Tie, TieConfig, lost, nearest

DOUBLE = torch.float64


def known() -> tuple[list[Tensor], list[Metric]]:
    generator = torch.Generator().manual_seed(8)
    common = torch.randn(10, WIDTH, generator=generator, dtype=DOUBLE)
    weights = [common + n * torch.randn(10, WIDTH, generator=generator, dtype=DOUBLE) for n in (0.2, 0.5, 1)]
    return weights, [Metric(hessian(seed=seed).matrix * 10**seed, 0.01) for seed in range(3)]


def test_the_nearest_is_that_of_least_squares() -> None:
    weights, metrics = known()
    sizes = [float(H.error(W).sum()) ** 0.5 for W, H in zip(weights, metrics, strict=True)]
    roots = [torch.linalg.cholesky(H.weigh(torch.eye(WIDTH, dtype=DOUBLE))) for H in metrics]
    inputs = torch.cat([root.T / size for root, size in zip(roots, sizes, strict=True)])
    outputs = torch.cat([(W @ root).T / size for W, root, size in zip(weights, roots, sizes, strict=True)])
    best = torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution.T
    one = nearest(weights, metrics)
    assert torch.allclose(one, best, atol=1e-5)
    each = lost(weights, metrics)
    own = [float(H.error(W - one).sum()) / size**2 for W, H, size in zip(weights, metrics, sizes, strict=True)]
    assert each == pytest.approx(own, rel=1e-9) and sum(each) == pytest.approx(
        float((inputs @ best.T - outputs).square().sum()), rel=1e-6
    )
    assert sum(lost([weights[0]] * 3, metrics)) < 1e-9  # the same matrix three times
    assert bool(nearest([weights[0] * 0, weights[0]], metrics[:2]).norm() > 0.1 * weights[0].norm())  # one has no size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_get_the_same_and_it_is_all_that_is_stored(dtype: torch.dtype) -> None:
    weights, metrics = known()
    plain = Tie(TieConfig(blocks=3))
    one, rows = plain.join(weights, metrics, dtype)
    assert all(bool(own.all()) for own in rows)
    for number, (W, own) in enumerate(zip(weights, rows, strict=True)):
        place = Place("a", number, 3, one, own)
        made = plain.at(place).compress(W.to(dtype), plain.prepare(hessian())).weight
        promised = plain.at(replace(place, right=None, pivots=None)).form((10, WIDTH), dtype).weight
        assert isinstance(made, LowRank) and isinstance(promised, LowRank)
        check_blocks(made)
        assert torch.equal(decode(made), one.float()) and made.shared == promised.shared == "a"
        factors = (made.left, promised.left, made.right)
        left, empty, right = (factor.weight for factor in factors if isinstance(factor, Dense))
        assert left.numel() == empty.numel() == 0 and right.data_ptr() != one.data_ptr()
