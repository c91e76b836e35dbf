"""What the inputs of a matrix weigh, and what is nearest to the matrix in its outputs.

Of all [out, in] of rank r, U U^T W is nearest to W in its outputs, where the columns of U are the first r eigenvectors
of W H W^T and H is what inputs weigh. SVD-LLM (Wang et al. 2025, arXiv 2403.07378) says the same as the truncated
decomposition of W S, S the Cholesky factor of H, times S^-1: with U^T W for a factor nothing has to be divided by S.
Where a matrix has more outputs than inputs, W S is decomposed by its other side, which is the smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink.methods.base import Prepared
from llmshrink.methods.hessian import Factors

SOLVABLE = 1e-9  # of its mean, added to the diagonal of normal equations
TILE = 512  # columns of H that are in float64 at a time


@dataclass(frozen=True)
class Metric:
    """What inputs weigh: H of the objective tr((W - V) H (W - V)^T)."""

    H: Tensor | None  # float32 [in, in], or its diagonal, float64 [in]; None: all weigh 1
    damp: float = 0.0  # added to the diagonal

    @classmethod
    def of(cls, prepared: Prepared) -> Metric:
        """The second moment of inputs; all inputs weigh the same where it could not be used."""
        return cls(prepared.H, prepared.damp) if isinstance(prepared, Factors) else cls(None)

    def weigh(self, W: Tensor) -> Tensor:
        """W H [out, in], in float64."""
        if self.H is None:
            return W
        if self.H.ndim == 1:
            return W * self.H
        found = W * self.damp
        for start in range(0, len(self.H), TILE):
            part = slice(start, start + TILE)
            found[:, part].addmm_(W, self.H[:, part].double())
        return found

    def dense(self, width: int) -> Tensor:
        """H itself [width, width], in float64."""
        if self.H is None:
            return torch.eye(width, dtype=torch.float64)
        found = self.H.double() if self.H.ndim == 2 else self.H.diag()
        found.diagonal().add_(self.damp)
        return found

    def root(self, W: Tensor) -> Tensor:
        """W S [out, in] for H = S S^T: S is the Cholesky factor, or where H is singular that of its eigenvectors."""
        if self.H is None:
            return W
        if self.H.ndim == 1:
            return W * self.H.sqrt()
        damped = self.dense(len(self.H))
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(damped)
        if info.item():
            values, factor = torch.linalg.eigh(damped)
            factor *= values.clamp(min=0).sqrt()
        return W @ factor

    def size(self, width: int) -> float:
        """The sum of what `width` inputs weigh."""
        if self.H is None:
            return float(width)
        return float((self.H if self.H.ndim == 1 else self.H.diagonal()).sum(dtype=torch.float64)) + self.damp * width

    def error(self, rest: Tensor) -> Tensor:
        """Of each row what inputs make of it: float64 [out]."""
        return (self.weigh(rest) * rest).sum(1)


def principal(W: Tensor, H: Metric, rank: int) -> Tensor:
    """The directions [out, rank] of its outputs in which W [out, in], float64, gives most; orthonormal, most first."""
    products, seen = _products(W, H)
    vectors: Tensor = torch.linalg.eigh(products)[1][:, -rank:].flip(1)
    if seen is not None:
        vectors = torch.linalg.qr(seen @ vectors)[0]
    return vectors


def spectrum(W: Tensor, H: Metric) -> Tensor:
    """What W [out, in] gives in each of its directions, float64 [min(out, in)], falling: squared singular values.

    They are those of W S for H = S S^T; the error of the nearest product of rank r is the sum of all but the first r.
    """
    found: Tensor = torch.linalg.eigvalsh(_products(W, H)[0])
    return found.flip(0).clamp_(min=0)


def _products(W: Tensor, H: Metric) -> tuple[Tensor, Tensor | None]:
    """W S times its transpose, on its smaller side; and W S [out, in], where that is the side of the inputs."""
    if len(W) <= W.shape[1]:
        return H.weigh(W) @ W.T, None
    seen = H.root(W)
    return seen.T @ seen, seen


def fitted(W: Tensor, right: Tensor, H: Metric) -> Tensor:
    """The factor [out, rank] that brings its product with `right` nearest to W: W H R^T (R H R^T)^-1, float64."""
    seen = H.weigh(right)
    normal = seen @ right.T
    normal.diagonal().add_(SOLVABLE * normal.diagonal().mean() + torch.finfo(torch.float64).tiny)
    solved: Tensor = torch.linalg.solve(normal, seen @ W.T)
    return solved.T
