# ruff: noqa: N806 - W is the papers' symbol
"""What is nearest to a matrix in its outputs, against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from correlated import WIDTH, hessian, normal
from torch import Tensor

from llmshrink.methods.metric import Metric, fitted, principal, spectrum

SHAPES = [(24, WIDTH), (WIDTH, WIDTH), (2 * WIDTH, WIDTH)]


def metrics() -> dict[str, Metric]:
    H = hessian().matrix
    return {"none": Metric(None), "diagonal": Metric(H.diagonal().double()), "full": Metric(H, 0.01)}


def exact(metric: Metric) -> Tensor:
    """H of a metric, float64 [in, in]."""
    found = metric.weigh(torch.eye(WIDTH, dtype=torch.float64))
    assert torch.equal(metric.dense(WIDTH), found)
    return found


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_tail_of_the_singular_values(shape: tuple[int, int], kind: str) -> None:
    W, metric = normal(shape), metrics()[kind]
    root = torch.linalg.cholesky(exact(metric))
    U, sizes, V = torch.linalg.svd(W @ root, full_matrices=False)
    assert torch.allclose(spectrum(W, metric), sizes.square(), rtol=1e-8)
    for rank in (1, 7, min(shape) - 1):
        found = principal(W, metric, rank)
        assert torch.allclose(found.T @ found, torch.eye(rank, dtype=torch.float64), atol=1e-9)
        near = found @ (found.T @ W)
        cut = (U[:, :rank] * sizes[:rank]) @ V[:rank]
        truncated = torch.linalg.solve_triangular(root, cut, upper=False, left=False)
        assert torch.allclose(near, truncated, atol=1e-7)  # what SVD-LLM says, with its inverse
        error = float(metric.error(W - near).sum())
        assert error == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-7)
        assert error == pytest.approx(float(((W - near) @ exact(metric) * (W - near)).sum()), rel=1e-7)


def test_a_singular_metric_has_a_root() -> None:
    x = normal((WIDTH, 5))
    W = normal((2 * WIDTH, WIDTH))
    metric = Metric((x @ x.T).float())
    assert torch.allclose(spectrum(W, metric)[:5], torch.linalg.svdvals(W @ x).square(), rtol=1e-4)


def test_a_factor_is_fitted_by_least_squares() -> None:
    W, right, metric = normal((10, WIDTH)), normal((4, WIDTH)) + 1, metrics()["full"]
    root = torch.linalg.cholesky(exact(metric))
    wanted = torch.linalg.lstsq((right @ root).T, (W @ root).T, driver="gelsd").solution.T
    assert torch.allclose(fitted(W, right, metric), wanted, atol=1e-6)
