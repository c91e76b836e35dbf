"""How far apart distributions over two vocabularies are.

ULD (Boizard et al. 2024, arXiv 2402.12030, equation 3) sorts both and sums the differences: only their shapes are
compared. Where tokens stand for the same text that gives away what is known, so these are compared with each other, all
others being one outcome: KL(p || q) over that partition; and what is left is sorted (as in TRL's GOLD, which has a
Jensen-Shannon divergence there). Of two vocabularies that are one it is KL(p || q).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SILENT = -torch.inf  # all logits of a position at which a teacher says nothing


@dataclass(frozen=True)
class Shared:
    """Tokens that stand for the same text.

    Attributes:
        own: The student's, int64 [pairs].
        other: The teacher's, in the same order.
    """

    own: Tensor
    other: Tensor


def uld(student: Tensor, teacher: Tensor, temperature: float, shared: Shared | None) -> Tensor:
    """The distance of each token [tokens], 0 where the teacher says nothing.

    Args:
        student: logits [tokens, vocabulary].
        teacher: logits [tokens, its own vocabulary].
        temperature: that divides both. Gradients of KL shrink as its square, those of sorted differences as itself, so
            these multiply them.
        shared: tokens that are compared with each other; None: all are sorted.
    """
    known = teacher[:, 0] != SILENT
    q = functional.log_softmax(student[known].float() / temperature, dim=-1)
    p = functional.log_softmax(teacher[known].float() / temperature, dim=-1)
    if shared is None:
        found = temperature * _sorted(p.exp(), q.exp())
    else:
        one, other = _parted(q, shared.own), _parted(p, shared.other)
        found = temperature**2 * _partition(other, one) + temperature * _sorted(other[1].exp(), one[1].exp())
    return torch.zeros(len(student), device=student.device).masked_scatter(known, found)


def _parted(logs: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that are named, in their order, and the others."""
    left = torch.ones(logs.shape[1], dtype=torch.bool, device=logs.device)
    left[taken] = False
    return logs[:, taken], logs[:, left]


def _partition(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> Tensor:
    """KL(p || q) of the first columns and of all others as one; where one of them has no others there is no such."""
    found = functional.kl_div(q[0], p[0], reduction="none", log_target=True).sum(-1)
    if p[1].shape[1] and q[1].shape[1]:
        rest, own = p[1].logsumexp(-1), q[1].logsumexp(-1)
        found = found + rest.exp() * (rest - own)
    return found


def _sorted(p: Tensor, q: Tensor) -> Tensor:
    """The sum of differences in order of size; the shorter is filled up with zeros."""
    width = max(p.shape[1], q.shape[1])
    high = (functional.pad(x.sort(-1, descending=True).values, (0, width - x.shape[1])) for x in (p, q))
    one, other = high
    return (one - other).abs().sum(-1)
