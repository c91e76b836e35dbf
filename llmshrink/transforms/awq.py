"""AWQ (Lin et al. 2023, arXiv 2306.00978): channels that carry much are made small before their weights are rounded.

The weights on channel j are multiplied by s_j and the channel is divided by it. With x_j its root mean square and w_j
the mean magnitude of the weights on it, in shares of their row's largest, the candidates are s = x^a (the paper's
equation 5) and s = x^a / w^(1 - a), for a from a grid; s = 1 is always one of them. The paper runs the layers for each
candidate; here the error of rounding W s / s is known exactly from H = mean of x x^T: tr(E H E^T), for some rows of W.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.statistics import Hessian
from llmshrink.transforms.base import Fed, Found, LinkKind, Scaling, TransformConfig, combined, repeat

LEAST = 1e-4  # of a magnitude, as a share of the mean: dead channels get a scale too


class AwqConfig(TransformConfig):
    """Settings of the search."""

    steps: int = Field(10, ge=1, description="exponents tried of each kind, evenly from 0 or 1/steps to 1")
    rows: int = Field(256, ge=1, description="rows of each matrix, evenly over it, on which candidates are tried")


class Awq(Scaling[AwqConfig]):
    """Searched channel scales."""

    links: ClassVar[tuple[LinkKind, ...]] = ("norm", "values", "product")
    needs = Hessian
    Config: ClassVar[type[AwqConfig]] = AwqConfig

    def search(self, fed: list[Fed], repeats: tuple[int, int]) -> Found:
        """The candidate under which rounding to nearest does least harm."""
        candidates = self._candidates(fed, repeats)
        scales = [repeat(scale, *repeats) for scale in candidates]
        errors = torch.zeros(len(candidates), dtype=torch.float64)
        for tensor in fed:
            H = _hessian(tensor)
            for read, rounded in zip(tensor.read, tensor.rounded, strict=True):
                W = read()
                W = W[:: -(-len(W) // self.config.rows)]
                for i, s in enumerate(scales):
                    E = rounded(W * s) / s - W
                    errors[i] += tensor.tokens * float(torch.linalg.vecdot(E @ H, E).sum(dtype=torch.float64))
        best = int(errors.nan_to_num(torch.inf).argmin())
        left = float(errors[best] / errors[0]) if errors[0] > 0 else 1.0
        return Found(candidates[best], left)

    def _candidates(self, fed: list[Fed], repeats: tuple[int, int]) -> list[Tensor]:
        """Scales [width] worth trying; the first are ones."""
        squares = torch.stack([tensor.tokens * _hessian(tensor).diagonal() for tensor in fed]).sum(0)
        x = _bounded(combined(squares, repeats, lambda part: part.mean(1)).sqrt())
        shares = torch.stack([_shares(read()) for tensor in fed for read in tensor.read]).sum(0)
        w = _bounded(combined(shares, repeats, lambda part: part.mean(1)))
        exponents = [step / self.config.steps for step in range(1, self.config.steps + 1)]
        found = [x**a for a in exponents] + [x**a / w ** (1 - a) for a in (0.0, *exponents[:-1])]
        return [torch.ones_like(x), *(s / (s.amax() * s.amin()).sqrt() for s in found)]


def _hessian(tensor: Fed) -> Tensor:
    found = tensor.gathered[Hessian]
    assert isinstance(found, Hessian)
    return found.matrix


def _shares(W: Tensor) -> Tensor:
    """The sum over rows of |W| [in], each as a share of its row's largest."""
    return (W.abs() / W.abs().amax(1, keepdim=True)).nan_to_num_(0).sum(0)


def _bounded(magnitudes: Tensor) -> Tensor:
    """Magnitudes around one, none of them zero."""
    mean = magnitudes.mean()
    return torch.ones_like(magnitudes) if not mean > 0 else (magnitudes / mean).clamp(min=LEAST)


TRANSFORM = Awq
