"""How far apart distributions over two vocabularies are.

ULD (Boizard et al. 2024, arXiv 2402.12030, equation 3) sorts both and sums the differences: only their shapes are
compared. What tokens stand for says more. One vocabulary may have a token for what is several to the other, so chances
are summed over tokens that begin with the same piece of text, and it is KL(p || q) over these sums; only what has no
such piece is sorted. (TRL's GOLD compares tokens of the same text alone: a letter with the same letter, though the
other one says the whole word.) Of two vocabularies that are one it is KL(p || q).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TINY = 1e-30  # chances of which the logarithm is taken
SILENT = -torch.inf  # all logits of a position at which a teacher says nothing


@dataclass(frozen=True)
class Shared:
    """Which tokens begin with the same piece of text.

    Attributes:
        own: The class of each token of the student's vocabulary, int64 [tokens], -1 of those that have none.
        other: The same of the teacher's.
    """

    own: Tensor
    other: Tensor

    @property
    def count(self) -> int:
        """How many classes there are."""
        return int(torch.cat([self.own, self.other]).max()) + 1


def uld(student: Tensor, teacher: Tensor, temperature: float, shared: Shared | None) -> Tensor:
    """The distance of each token [tokens], 0 where the teacher says nothing.

    Args:
        student: logits [tokens, vocabulary].
        teacher: logits [tokens, its own vocabulary].
        temperature: that divides both. Gradients of KL shrink as its square, those of sorted differences as itself, so
            these multiply them.
        shared: tokens that are compared as one; None: all are sorted.
    """
    known = teacher[:, 0] != SILENT
    q = functional.log_softmax(student[known].float() / temperature, dim=-1)
    p = functional.log_softmax(teacher[known].float() / temperature, dim=-1)
    if shared is None:
        found = temperature * _sorted(p.exp(), q.exp())
    else:
        q, p = q.exp(), p.exp()
        found = temperature**2 * _kl(_sums(p, shared.other, shared.count), _sums(q, shared.own, shared.count))
        found = found + temperature * _sorted(p[:, shared.other < 0], q[:, shared.own < 0])
    return torch.zeros(len(student), device=student.device).masked_scatter(known, found)


def _sums(chances: Tensor, classes: Tensor, count: int) -> Tensor:
    """Chances of each class, and of all that has none."""
    places = classes.where(classes >= 0, count)
    return chances.new_zeros(len(chances), count + 1).index_add(1, places, chances)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) along the last dimension, where the student can say what the teacher does."""
    possible = (p > 0) & (q > 0)
    return (p * (p.clamp_min(TINY).log() - q.clamp_min(TINY).log())).where(possible, 0).sum(-1)


def _sorted(p: Tensor, q: Tensor) -> Tensor:
    """The sum of differences in order of size; the shorter is filled up with zeros."""
    width = max(p.shape[1], q.shape[1])
    high = (functional.pad(x.sort(-1, descending=True).values, (0, width - x.shape[1])) for x in (p, q))
    one, other = high
    return (one - other).abs().sum(-1)
