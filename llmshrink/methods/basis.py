"""One right factor for matrices of several blocks: a basis of what they look at in their inputs.

Matrices W_i [out, in] on top of each other are one matrix, and its nearest product has one right factor R [rank, in]:
each W_i is L_i R with a left factor of its own (Basis Sharing, Wang et al. 2024, arXiv 2410.03765). Inputs are counted
by the mean of their second moments, as there, but each as a share of its trace, and each matrix by the size of its
outputs: else the block with the largest states would decide for all. What a basis loses of W_i is measured under W_i's
own moments, where L_i is the best there is.

Rows of the products are stored in place of R (`LowRank.pivots`), as many of each matrix: so all bytes are known before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from llmshrink.methods.base import Method, Prepared
from llmshrink.methods.lowrank import COPIES, DOUBLE, SQUARES, pivots
from llmshrink.methods.metric import Metric, fitted, principal

ROOTS = 3  # float64 copies of a second moment while its root is found


@dataclass(frozen=True)
class Place:
    """Of one matrix among those that share a right factor.

    Attributes:
        home: Name of the first, beside which it is stored.
        number: Which of them it is.
        count: How many they are.
        right: The factor [rank, in] as it is stored; None: it is not made yet.
        pivots: Bool [out], the matrix's own rows in it.
    """

    home: str
    number: int
    count: int
    right: Tensor | None = None
    pivots: Tensor | None = None

    def stacked(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of all on top of each other, where each has this one."""
        return self.count * shape[0], shape[1]

    def own(self, rank: int) -> slice:
        """The rows of a right factor of this rank that are rows of this matrix."""
        ends = [n * (rank // self.count) + min(n, rank % self.count) for n in (self.number, self.number + 1)]
        return slice(*ends)


class Sharing(Method[Any]):
    """A method by which matrices of several blocks have a tensor in common; its settings say of how many `blocks`.

    Attributes:
        place: Among the matrices that share; None: this one does not.
    """

    place: Place | None = None

    def at(self, place: Place) -> Self:
        """The same for a matrix that shares."""
        placed = copy(self)
        placed.place = place
        return placed

    @abstractmethod
    def metric(self, prepared: Prepared) -> Metric:
        """What inputs weigh."""

    @abstractmethod
    def join(
        self, weights: Sequence[Tensor], metrics: Sequence[Metric], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """What they share [rank, in] as it is stored, and of each which rows lie in it, bool [out].

        Args:
            weights: float64 [out, in] each.
            metrics: what the inputs of each weigh.
            dtype: of what is stored.
        """


def directions(weights: Sequence[Tensor], metrics: Sequence[Metric]) -> Tensor:
    """Rows [n, in] of which the first r are the basis of rank r, for each r up to n = min(sum of out, in); float64.

    Args:
        weights: float64 [out, in] each.
        metrics: what the inputs of each weigh.
    """
    sizes = [metric.size(weight.shape[1]) for metric, weight in zip(metrics, weights, strict=True)]
    losses = [float(metric.error(weight).sum()) for metric, weight in zip(metrics, weights, strict=True)]
    scales = [(size / loss) ** 0.5 if loss > 0 else 0.0 for size, loss in zip(sizes, losses, strict=True)]
    stack = torch.cat([weight * scale for weight, scale in zip(weights, scales, strict=True)])
    found = principal(stack, mean(metrics, sizes), min(stack.shape)).T @ stack
    return found.div_(found.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float64).tiny))


def scratch(shape: tuple[int, int]) -> int:
    """Bytes that finding the directions of matrices takes that are [out, in] on top of each other."""
    whole, square = shape[0] * shape[1], min(shape) ** 2
    return DOUBLE * (COPIES * whole + SQUARES * square + ROOTS * shape[1] ** 2)


def mean(metrics: Sequence[Metric], sizes: Sequence[float]) -> Metric:
    """The sum of metrics, each divided by its size; all inputs weigh the same where one of them says so."""
    known = [metric.H for metric in metrics if metric.H is not None and metric.H.ndim == 2]
    if len(known) < len(metrics):
        return Metric(None)
    total = torch.zeros_like(known[0])
    for H, size in zip(known, sizes, strict=True):
        total.add_(H, alpha=1 / size)
    return Metric(total, sum(metric.damp / size for metric, size in zip(metrics, sizes, strict=True)))


def left_behind(weight: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    """The share of W [out, in] that the first r rows of `rows` [n, in] lose, for each r from 0: float64 [n + 1].

    With the best left factor for each: outputs are projected on what these rows see of the inputs.
    """
    both = metric.root(torch.cat([rows, weight]))  # one root for both
    seen = torch.linalg.qr(both[: len(rows)].T)[0]
    kept = (both[len(rows) :] @ seen).square().sum(0).cumsum(0)
    total = metric.error(weight).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.cat([kept.new_ones(1), 1 - kept / total]).clamp_(min=0)


def basis(
    weights: Sequence[Tensor], metrics: Sequence[Metric], rank: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The right factor [rank, in] in `dtype`, whose rows are rows of the products; and which of each, bool [out].

    Args:
        weights: float64 [out, in] each.
        metrics: what the inputs of each weigh.
        rank: of the product of all of them on top of each other.
        dtype: that it is stored in.
    """
    rows = directions(weights, metrics)[:rank]
    lefts = [fitted(weight, rows, metric) for weight, metric in zip(weights, metrics, strict=True)]
    places = [Place("", number, len(lefts)).own(rank) for number in range(len(lefts))]
    chosen = spread(lefts, [place.stop - place.start for place in places])
    right = torch.cat([left[own] @ rows for left, own in zip(lefts, chosen, strict=True)])
    return right.to(dtype), chosen


def spread(lefts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """`counts` rows of each matrix [out, rank] that together make all rows, with small shares: bool [out] each.

    Of the first those that make most of what it says; of the next those of what these do not say.
    """
    unsaid = torch.eye(lefts[0].shape[1], dtype=lefts[0].dtype, device=lefts[0].device)
    found = []
    for left, count in zip(lefts, counts, strict=True):
        rest = left @ unsaid
        strongest = torch.linalg.svd(rest, full_matrices=False)[0][:, :count]
        chosen = pivots(strongest) if count else torch.zeros(len(left), dtype=torch.bool, device=left.device)
        found.append(chosen)
        unsaid = unsaid @ torch.linalg.qr(rest[chosen].T, mode="complete")[0][:, count:]
    return found
