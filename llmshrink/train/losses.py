"""How far a student's next-token distribution is from its teacher's: nats, summed over tokens.

With p the teacher's and q the student's, both of logits divided by a temperature T: forward KL(p || q); reverse KL(q ||
p) (MiniLLM, Gu et al. 2024, arXiv 2306.08543); and the generalised Jensen-Shannon divergence with m = b p + (1 - b) q,
b KL(p || m) + (1 - b) KL(q || m) (GKD, Agarwal et al. 2024, arXiv 2306.13649). Gradients shrink as 1 / T^2, so each is
multiplied by T^2 (Hinton et al. 2015, arXiv 1503.02531). Of two vocabularies it is `uld`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from llmshrink.recipe.distill import LossSpec
from llmshrink.train import sparse
from llmshrink.train.sparse import Sparse
from llmshrink.train.uld import Shared, uld


def divergence(student: Tensor, teacher: Tensor | Sparse, spec: LossSpec, shared: Shared | None = None) -> Tensor:
    """The divergence of each token [tokens], from logits [tokens, vocabulary] of both, in float32.

    Of a teacher of whom only some tokens are known it is forward KL.
    """
    if isinstance(teacher, Sparse):
        return sparse.divergence(student, teacher, spec.temperature) * spec.temperature**2
    if spec.name == "uld":
        return uld(student, teacher, spec.temperature, shared)
    q = functional.log_softmax(student.float() / spec.temperature, dim=-1)
    p = functional.log_softmax(teacher.float() / spec.temperature, dim=-1)
    if spec.name == "kl":
        found = _kl(p, q)
    elif spec.name == "reverse-kl":
        found = _kl(q, p)
    else:
        mixed = torch.logaddexp(p + math.log(spec.beta), q + math.log1p(-spec.beta))
        found = spec.beta * _kl(p, mixed) + (1 - spec.beta) * _kl(q, mixed)
    return found * spec.temperature**2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) along the last dimension, of logarithms."""
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def mixed(
    student: Tensor, teacher: Tensor | Sparse | None, labels: Tensor, spec: LossSpec, shared: Shared | None = None
) -> Tensor:
    """The loss that a step makes small, summed over the tokens that count.

    Args:
        student: logits [tokens, vocabulary].
        teacher: the same of the teacher, or what is kept of it; None: nobody teaches, and only the text counts.
        labels: the tokens that follow [tokens]; -100 where none counts.
        spec: what is mixed.
        shared: of two vocabularies, tokens that stand for the same text.
    """
    counted = labels != -100
    if teacher is None or spec.alpha == 0:
        return functional.cross_entropy(student.float(), labels, reduction="sum")
    loss = spec.alpha * (divergence(student, teacher, spec, shared) * counted).sum()
    if spec.alpha < 1:
        loss = loss + (1 - spec.alpha) * functional.cross_entropy(student.float(), labels, reduction="sum")
    return loss
