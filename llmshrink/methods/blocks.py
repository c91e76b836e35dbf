"""The search for the scales and minima of GGUF's block types: the least weighted squared error.

A group of weights x is stored as codes q and means s q - m. With the codes fixed, the error is a parabola in (s, m),
known from a few sums over the group (its moments); so every trial stands for its codes, and is judged by the best that
they allow. In the k-quants s and m are integers times one float16 for the whole block. These integers start from what
is best without that rule, and then move on their own grid: the integers given the codes, codes given the integers,
steps to their neighbours, and the block's float16 by least squares over all its groups.

llama.cpp's encoders (ggml-quants.c) try scales with one end of the range held fast, and round each group's scale and
minimum independently of the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmshrink.block_types import BlockType

CHUNK = 1 << 18  # weights searched at a time
# How far inside the range of a group its grid begins and ends, in steps of a grid that just covers it: out of 256 such
# pairs those that together leave the least error, by greedy choice over normal and heavy-tailed weights; and none.
ENDS = (
    (0.0, 0.0),
    *((0.25, 0.0), (-0.25, 0.25), (0.25, -0.75), (0.0, 0.25), (0.5, -0.25), (-1.0, -1.0), (0.0, 0.75), (0.0, -1.25)),
    *((0.0, -0.25), (0.75, 0.25), (-0.25, -1.0), (1.75, 0.25), (0.25, 0.25), (0.0, 1.25), (0.0, 2.0), (1.25, 0.25)),
)
COARSE_ENDS = (  # of 2 bits
    *((0.25, 0.25), (0.0, 0.5), (0.5, 0.0), (0.25, 1.0), (1.0, 0.25), (0.5, 0.25)),
    *((0.25, 0.5), (0.0, 1.25), (0.0, 0.0), (0.5, 0.75), (0.75, -0.25), (-1.0, 0.25)),
)
# Steps by which the largest weight of a group lies beyond the last code; no more inside than half of the codes.
REACHES = (-5.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
TERNARY_REACHES = (0.2, 1.0, 1.5, 2.0, 2.5, 3.2, 4.0)
ROUNDS = 2  # of integers, codes and the block's float16 in turn
PROBES = (-2, -1, 1, 2)  # neighbours of a scale's integer whose codes are tried
UNITS = 32  # values tried for a block's float16
TIGHTEST = 0.6  # the smallest of them, as a share of the one that reaches the largest scale


class Tables(NamedTuple):
    """Scales, and where the type has them minima, of a matrix as they decode, with the float16 of nested ones."""

    scale: Tensor  # float32 [out, groups]
    minimum: Tensor | None  # float32 [out, groups]
    scale_unit: Tensor | None  # float32 [out, blocks], a float16's value; None: the scales are float16 themselves
    minimum_unit: Tensor | None


class _Moments(NamedTuple):
    """Weighted sums over each group, [groups], for codes q and weights x."""

    q: Tensor  # zero for types without minima
    qq: Tensor
    xq: Tensor


class _Pair(NamedTuple):
    """Scale and minimum of each group [groups]: numbers, or integers of a unit; zero minima where there are none."""

    scale: Tensor
    minimum: Tensor

    def times(self, unit: _Pair) -> _Pair:
        """What integers of a unit mean."""
        return _Pair(self.scale * unit.scale, self.minimum * unit.minimum)


class _Found(NamedTuple):
    """The best so far, and what it takes off the error of each group [groups]."""

    gain: Tensor
    pair: _Pair

    def or_better(self, gain: Tensor, pair: _Pair) -> _Found:
        """In each group the better one."""
        better = gain > self.gain
        scale, minimum = (torch.where(better, new, old) for new, old in zip(pair, self.pair, strict=True))
        return _Found(torch.where(better, gain, self.gain), _Pair(scale, minimum))


class _Groups:
    """Groups of weights x and the costs of their errors, both [group, groups]: sums run over the first dimension."""

    def __init__(self, x: Tensor, cost: Tensor, kind: BlockType) -> None:
        self.x, self.cost, self.kind = x, cost, kind
        self.weighted = cost * x
        self.total, self.along = cost.sum(0), self.weighted.sum(0)
        self.zeros = torch.zeros_like(self.total)

    def moments(self, pair: _Pair) -> _Moments:
        """Of the codes nearest to the weights under these scales and minima."""
        inverse = _inverse(pair.scale)
        codes = (self.x + pair.minimum).mul_(inverse) if self.kind.minimum else self.x * inverse
        codes.round_().clamp_(*self.kind.code_range)
        along = (self.weighted * codes).sum(0)
        weighted = self.cost * codes
        total = weighted.sum(0) if self.kind.minimum else self.zeros
        return _Moments(total, weighted.mul_(codes).sum(0), along)

    def gain(self, of: _Moments, pair: _Pair) -> Tensor:
        """What scales and minima take off sum cost x^2 with the codes fixed."""
        s, m = pair
        gain = s * (2 * of.xq - s * of.qq)
        return gain.add_(m * (2 * (s * of.q - self.along) - m * self.total)) if self.kind.minimum else gain

    def best(self, of: _Moments) -> _Pair:
        """Scales and minima of the least error with the codes fixed."""
        plain = (of.xq / of.qq).nan_to_num_(0, 0, 0)
        if not self.kind.minimum:
            return _Pair(plain, self.zeros)
        both = self.total * of.qq
        apart = both - of.q.square()  # zero where all codes are the same
        slope = (self.total * of.xq - self.along * of.q) / apart
        scale = torch.where(apart > 1e-6 * both, slope, plain)
        minimum = (scale * of.q - self.along) / self.total
        if self.kind.nested is None:
            return _Pair(scale, minimum)
        outside = (scale < 0) | (minimum < 0)
        return _Pair(torch.where(outside, plain.clamp_(min=0), scale), minimum.masked_fill_(outside, 0))

    def minimum(self, of: _Moments, scale: Tensor) -> Tensor:
        """Minima of the least error with codes and scales fixed, of any sign."""
        return (scale * of.q - self.along) / self.total if self.kind.minimum else self.zeros


def search(weight: Tensor, kind: BlockType, importance: Tensor | None = None) -> Tables:
    """Scales and minima for a float32 matrix [out, in] whose width is whole blocks.

    Args:
        weight: float32 [out, in].
        kind: what is stored of each block.
        importance: float32 [in], positive weights of the squared errors of each input; None: all equal.
    """
    out, width = weight.shape
    # By a power of two, which changes no digit: products of importances must neither overflow nor vanish.
    cost = weight.new_ones(width) if importance is None else importance.ldexp(-importance.mean().frexp().exponent)
    parts: list[list[Tensor | None]] = []
    for rows in torch.split(weight, max(1, CHUNK // width)):
        x, costs = (t.reshape(-1, kind.group).T.contiguous() for t in (rows, cost.expand_as(rows)))
        groups = _Groups(x, costs, kind)
        tables = _halves(groups) if kind.nested is None else _nested(groups)
        parts.append([None if table is None else table.view(len(rows), -1) for table in tables])
    columns = [[table for table in column if table is not None] for column in zip(*parts, strict=True)]
    scale, *others = (torch.cat(column) if column else None for column in columns)
    assert scale is not None
    return Tables(scale, *others)


def _free(groups: _Groups) -> _Pair:
    """Scales and minima that may be any number."""
    found = _Found(torch.full_like(groups.total, -torch.inf), _Pair(groups.zeros, groups.zeros))
    for pair in _starts(groups):
        of = groups.moments(pair)
        best = groups.best(of)
        found = found.or_better(groups.gain(of, best), best)
    of = groups.moments(found.pair)
    best = groups.best(of)
    return found.or_better(groups.gain(of, best), best).pair


def _starts(groups: _Groups) -> Iterator[_Pair]:
    """Scales and minima whose codes are worth trying."""
    kind, (low, high) = groups.kind, groups.kind.code_range
    if not kind.minimum:
        reach = groups.x.abs().amax(0)
        for beyond in REACHES if kind.levels is None else TERNARY_REACHES:
            for sign in (1, -1) if kind.levels is None else (1,):
                if beyond > low / 2:
                    yield _Pair(reach * (sign / (beyond - low)), groups.zeros)
        return
    least, most = groups.x.amin(0), groups.x.amax(0)
    if kind.nested is not None:
        least, most = least.clamp_(max=0), most.clamp_(min=0)
    step = (most - least) / high
    for begin, end in COARSE_ENDS if kind.bits == 2 else ENDS:
        yield _Pair(step * ((high - begin - end) / high), -(least + step * begin))


def _halves(groups: _Groups) -> Tables:
    """Scales and minima that are float16 themselves: rounded, and fitted to their codes again."""
    found = _Found(torch.full_like(groups.total, -torch.inf), _Pair(groups.zeros, groups.zeros))
    pair = _free(groups)
    pair = _Pair(_half(pair.scale), _half(pair.minimum))
    for _ in range(ROUNDS + 1):
        of = groups.moments(pair)
        found = found.or_better(groups.gain(of, pair), pair)
        scale = _half(groups.best(of).scale)
        pair = _Pair(scale, _half(groups.minimum(of, scale)))
    return Tables(found.pair.scale, found.pair.minimum if groups.kind.minimum else None, None, None)


def _nested(groups: _Groups) -> Tables:
    """Scales and minima that are integers of one float16 for each block."""
    kind = groups.kind
    per = kind.size // kind.group
    free = _free(groups)
    of = groups.moments(free)
    curvature = of.qq - torch.where(free.minimum > 0, of.q.square() / groups.total, 0)
    scale = _unit(free.scale, curvature, kind).repeat_interleave(per)
    minima = groups.minimum(of, (free.scale * _inverse(scale)).round_() * scale).clamp_(min=0)
    minimum = _unit(minima, groups.total, kind).repeat_interleave(per) if kind.minimum else groups.zeros
    unit = _Pair(scale, minimum)
    found = _integers(groups, of, unit)
    for _ in range(ROUNDS):
        found = _descend(groups, found.pair, unit)
        unit = _refit(groups, found.pair, unit)
    pair = _descend(groups, found.pair, unit).pair.times(unit)
    if kind.minimum:
        return Tables(pair.scale, pair.minimum, unit.scale[::per], unit.minimum[::per])
    return Tables(pair.scale, None, unit.scale[::per], None)


def _unit(values: Tensor, curvature: Tensor, kind: BlockType) -> Tensor:
    """For each block the float16 [blocks] of which the best integers lie closest to `values` [groups].

    Args:
        values: what is to be stored of each group.
        curvature: cost of its squared error.
        kind: which integers there are.
    """
    low, high = kind.scale_range
    reach = torch.cat([torch.linspace(high + 0.5, high * TIGHTEST, UNITS), 2.0 ** torch.arange(high.bit_length() - 1)])
    if low < 0:
        reach = torch.cat([reach, -reach])
    reach = reach.to(values.device)
    rows = values.view(-1, kind.size // kind.group, 1)
    units = _half(rows.abs().amax(1, keepdim=True) / reach)  # [blocks, 1, tried]
    integers = (rows * _inverse(units)).round_().clamp_(low, high)
    loss = integers.mul_(units).sub_(rows).square_().mul_(curvature.view_as(rows)).sum(1)
    return units[:, 0].gather(1, loss.argmin(1, keepdim=True))[:, 0]


def _integers(groups: _Groups, of: _Moments, unit: _Pair) -> _Found:
    """With the codes fixed: the two integers around the best scale, each with the best minimum under it."""
    low, high = groups.kind.scale_range
    below = (groups.best(of).scale * _inverse(unit.scale)).floor_()
    inverse = _inverse(unit.minimum)
    found = _Found(torch.full_like(below, -torch.inf), _Pair(groups.zeros, groups.zeros))
    for scale in (below.clamp(low, high), (below + 1).clamp_(low, high)):
        minimum = (groups.minimum(of, scale * unit.scale) * inverse).round_().clamp_(low, high)
        pair = _Pair(scale, minimum)
        found = found.or_better(groups.gain(of, pair.times(unit)), pair)
    return found


def _descend(groups: _Groups, pair: _Pair, unit: _Pair) -> _Found:
    """Integers no worse than `pair`: those that fit its codes, or the codes of its neighbours."""
    low, high = groups.kind.scale_range
    of = groups.moments(pair.times(unit))
    found = _Found(groups.gain(of, pair.times(unit)), pair).or_better(*_integers(groups, of, unit))
    inverse = _inverse(unit.minimum)
    for probe in PROBES:
        scale = (found.pair.scale + probe).clamp_(low, high)
        minimum = (groups.minimum(of, scale * unit.scale) * inverse).round_().clamp_(low, high)
        near = groups.moments(_Pair(scale, minimum).times(unit))
        found = found.or_better(*_integers(groups, near, unit))
    return found


def _refit(groups: _Groups, pair: _Pair, unit: _Pair) -> _Pair:
    """The float16 of each block that fit its integers and their codes best, by least squares, where that is better."""
    kind = groups.kind
    per = kind.size // kind.group

    def over_block(value: Tensor) -> Tensor:
        return value.view(-1, per).sum(1).repeat_interleave(per)

    of = groups.moments(pair.times(unit))
    a, b = pair
    square, along = over_block(a.square() * of.qq), over_block(a * of.xq)
    scale, minimum = (along / square).nan_to_num_(0, 0, 0), groups.zeros
    if kind.minimum:
        cross, other = over_block(a * b * of.q), over_block(b.square() * groups.total)
        shift = over_block(b * groups.along)
        apart = square * other - cross.square()  # zero where all minima are zero
        scale = _half(torch.where(apart > 1e-6 * square * other, (along * other - shift * cross) / apart, scale))
        minimum = _half(((scale * cross - shift) / other).nan_to_num_(0, 0, 0).clamp_(min=0))
    fitted = _Pair(_half(scale), minimum)
    after = groups.gain(groups.moments(pair.times(fitted)), pair.times(fitted))
    better = over_block(after) > over_block(groups.gain(of, pair.times(unit)))
    return _Pair(*(torch.where(better, new, old) for new, old in zip(fitted, unit, strict=True)))


def _half(values: Tensor) -> Tensor:
    """The nearest finite float16, as float32."""
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).half().float()


def _inverse(values: Tensor) -> Tensor:
    """1 / value, and zero for zero."""
    return values.reciprocal().nan_to_num_(0, 0, 0)
