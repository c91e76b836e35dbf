"""A teacher's distribution in a few of its tokens, and how far a student's is from it.

Which tokens: the likeliest (top-k), or a sample by which any sum over the vocabulary is estimated without bias, as
random-sampling distillation asks (Anshumann et al. 2025, arXiv 2503.16870). There tokens are drawn one by one, with
replacement, and counted. Here a token of chance p is kept with the chance min(1, p / t) and counts max(p, t), with t
such that exactly k are kept: of all unbiased samples of k tokens the one with the least variance (Fearnhead and
Clifford 2003, "On-line inference for hidden Markov models via particle filters"), drawn in one pass by systematic
sampling (Madow 1949). So the likeliest are kept as they are, and the others stand for the tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN = 1e-9  # weight of a half as the student's share of the tail: no other position says more


@dataclass(frozen=True)
class Sparse:
    """Some tokens of each position.

    Attributes:
        tokens: int64 [positions, k].
        logs: Their log chances at temperature 1, float32 [positions, k].
        shift: log sum p^(1/T), float32 [positions]: the log chance at temperature T is log p / T - shift.
        threshold: log t, float32 [positions]; -inf: nothing was drawn.
        temperature: T, at which they were chosen.
        rest: What is not kept is one more token, of which only the chance is known.
    """

    tokens: Tensor
    logs: Tensor
    shift: Tensor
    threshold: Tensor
    temperature: float
    rest: bool = False

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Log chances at a temperature, T or 1, and how many tokens each stands for, 1 / (chance to be kept)."""
        softened = self.logs / self.temperature - self.shift[..., None]
        kept = (softened - self.threshold[..., None]).clamp(max=0)
        return softened if temperature == self.temperature else self.logs, kept.neg().exp()


def divergence(student: Tensor, words: Sparse, temperature: float) -> Tensor:
    """KL(p || q) of each position [positions], at temperature T or 1; an estimate where tokens were drawn.

    With `rest` it is that of two distributions over the tokens that are kept and one more for all others: at most the
    divergence over all tokens.

    Args:
        student: logits [positions, vocabulary].
        words: of the teacher.
        temperature: both are softened by it.
    """
    scores = student.float() / temperature
    total = scores.logsumexp(-1, keepdim=True)
    p, count = words.at(temperature)
    q = scores.gather(-1, words.tokens) - total
    found = (count * p.exp() * (p - q)).sum(-1)
    if words.tokens.shape[-1] == student.shape[-1]:
        return found
    if words.rest:
        left = (1 - p.exp().sum(-1)).clamp(min=torch.finfo(torch.float32).tiny)
        return found + left * (left.log() - _others(scores, total, words.tokens, torch.zeros_like(q, dtype=torch.bool)))
    if not torch.is_grad_enabled():
        return found
    steady = _steadied(scores, total, words.tokens, p, q, count)
    return steady + (found - steady).detach()


def _others(scores: Tensor, total: Tensor, tokens: Tensor, but: Tensor) -> Tensor:
    """The log of a student's chance of all tokens that are not among these, `but` some of them [positions]."""
    kept = scores.gather(-1, tokens).masked_fill(~but, -torch.inf)
    return scores.scatter(-1, tokens, kept).logsumexp(-1) - total.squeeze(-1)


def _steadied(scores: Tensor, total: Tensor, tokens: Tensor, p: Tensor, q: Tensor, count: Tensor) -> Tensor:
    """What has on average the gradient of the divergence, with less noise from the draw than the estimate has.

    Of the tail, all but the tokens that are kept for certain, a share is taken to be as the student has it, with the
    teacher's chance of the whole tail, and the tokens that are drawn put right what that is off: a control variate.
    """
    drawn = count > 1
    mass = (count * p.exp() * drawn).sum(-1, keepdim=True)  # of the teacher's tail: t for each token drawn
    tail = _others(scores, total, tokens, drawn)
    own = mass * (q - tail[:, None]).exp() * drawn
    share = _share(own / p.exp().clamp(min=torch.finfo(torch.float32).tiny), drawn, mass).detach()
    targets = (count * (p.exp() - share * own)).detach()
    return -(targets * q).sum(-1) - (share * mass).squeeze(-1) * tail


def _share(ratio: Tensor, drawn: Tensor, mass: Tensor) -> Tensor:
    """How much of the tail is best taken from the student [positions, 1].

    Of n tokens drawn by chances p the noise in all gradients is mass^2 / n E(1 - a r)^2, where r is the student's
    chance over p in the tail, whose mean is 1: least at a = 1 / E(r^2). What the other positions have drawn says that,
    and not the position's own draw: with that the mean of the gradients would be another one.

    Args:
        ratio: r, of the tokens that are drawn [positions, k].
        drawn: which these are.
        mass: of the teacher's tail [positions, 1].
    """
    number = drawn.sum(-1, keepdim=True).clamp(min=1)
    noise = mass.square() / number
    squares = noise * (ratio.square() * drawn).sum(-1, keepdim=True) / number
    found = (noise.sum() - noise + UNKNOWN / 2) / (squares.sum() - squares + UNKNOWN)
    return found.clamp(0, 1)


def likeliest(logits: Tensor, count: int, temperature: float) -> Sparse:
    """The `count` likeliest tokens of logits [positions, vocabulary]."""
    logs = logits.float().log_softmax(-1)
    top = logs.topk(min(count, logs.shape[-1]))
    nothing = torch.full_like(logs[:, 0], -torch.inf)
    return Sparse(top.indices, top.values, _shift(logs, temperature), nothing, temperature, rest=True)


def _shift(logs: Tensor, temperature: float) -> Tensor:
    return torch.zeros_like(logs[:, 0]) if temperature == 1 else (logs / temperature).logsumexp(-1)


def drawn(logits: Tensor, count: int, temperature: float, uniform: Tensor) -> Sparse:
    """`count` tokens of logits [positions, vocabulary] that stand for all.

    Args:
        logits: of the teacher.
        count: how many, k.
        temperature: T, of the chances by which they are kept.
        uniform: numbers in [0, 1), float64 [positions], which decide what is drawn.
    """
    logs = logits.float().log_softmax(-1)
    shift = _shift(logs, temperature)
    softened = logs if temperature == 1 else logs / temperature - shift[:, None]
    top = softened.topk(min(count, logs.shape[-1]))
    place = torch.arange(top.values.shape[-1], device=logits.device)
    likely = top.values.exp().double()
    tail = softened.exp().scatter_(-1, top.indices, 0)
    left = likely.flip(-1).cumsum(-1).flip(-1) + tail.sum(-1, keepdim=True, dtype=torch.float64)  # from each rank on
    sure = likely >= left / (len(place) - place)  # kept for certain: the first ranks
    head = sure.sum(-1, keepdim=True)
    sums = tail.scatter_(-1, top.indices, likely.masked_fill(sure, 0).float()).cumsum(-1, dtype=torch.float64)
    step = sums[:, -1:] / (len(place) - head).clamp(min=1)  # t
    points = (uniform[:, None] + (place - head).clamp(min=0)) * step
    found = torch.searchsorted(sums, points, right=True).clamp(max=logs.shape[-1] - 1)
    tokens = torch.where(place < head, top.indices, found)
    return Sparse(tokens, logs.gather(-1, tokens), shift, step.squeeze(-1).log().float(), temperature)
