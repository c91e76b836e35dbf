"""Weights that are learned through the rounding of the grid that is written.

In the forward pass a weight w of a group with the scale s and the zero point z is

    s * (clamp(round(w / s + z), low, high) - z),

the very number that a reader of the file finds. Gradients pass through the rounding as if it were not there (Bengio et
al. 2013, arXiv 1308.3432), and not where it is cut off. The scale gets that of LSQ (Esser et al. 2020, arXiv
1902.08153, eq. 3): what rounding adds to w in steps, and where it is cut off, the end of the range. The zero point gets
that of LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576): -s where it is cut off. Two things are other than there. A weight
counts as cut off where its code would lie outside of the range, not where w / s does: with 2 bits half of the outer
steps would never learn. And scales are learned as factors e^f of what they were: none becomes zero or changes its sign,
and a rate means the same for all of them, so that LSQ's weight of their gradients, which Adam would take back, is not
needed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.forms import Dense, Quantized, without_data
from llmshrink.model.rounding import as_stored, straight_through

CELL = 0.49  # steps from a code within which its latent weight starts; at half a step it would be the next code's


class Rounding(nn.Module):
    """What makes of a latent matrix [out, in] the one that its codes and scales mean (`torch.nn.utils.parametrize`).

    Attributes:
        factor: float32 [out, groups], the logarithm of what scales have been multiplied by.
        shift: float32 [out, groups], how far zero points have moved; None: there are none.
        kept: bool [out, in], false where a weight is zero and stays so; None: nowhere.
    """

    _scale: Tensor  # of the start, float32 [out, groups]
    _zero: Tensor | None
    kept: Tensor | None

    def __init__(self, start: Quantized, *, kept: Tensor | None = None) -> None:
        """Begin with what a method chose.

        Args:
            start: codes [out, in] on an even grid, under one table of scales.
            kept: bool [out, in], false where a weight is zero and stays so; None: nowhere.
        """
        super().__init__()
        assert isinstance(start.scale, Dense) and not isinstance(start.block, int)
        like = without_data(start)
        assert isinstance(like, Quantized)
        self._form = like
        half = 1 << start.bits - 1
        self._ends = (-half, half - 1)
        self.register_buffer("_scale", start.scale.weight.float().contiguous(), persistent=False)
        self.register_buffer("_zero", None if start.zero is None else start.zero.float(), persistent=False)
        self.register_buffer("kept", kept, persistent=False)
        self.factor = nn.Parameter(torch.zeros_like(self._scale))
        self.shift = None if start.zero is None else nn.Parameter(torch.zeros_like(self._scale))

    def latent(self, weight: Tensor, codes: Tensor) -> Tensor:
        """Where the latent matrix starts: the points nearest to `weight` that have these codes, all [out, in]."""
        scale, zero = self._tables()
        middle = self._groups(codes.float())
        exact = self._groups(weight) / scale + zero
        inside = torch.clamp(exact, middle - CELL, middle + CELL)
        return ((inside - zero) * scale).detach().view(weight.shape)

    def forward(self, latent: Tensor) -> Tensor:
        """The matrix that is computed with, float32 [out, in]."""
        values = self._groups(latent)
        # torch leaves `apply` untyped.
        found: Tensor = _Rounded.apply(values, *self._tables(), *self._ends)  # type: ignore[no-untyped-call]
        weight = found.view(latent.shape)
        return weight if self.kept is None else weight * self.kept

    @torch.no_grad()
    def form(self, latent: Tensor) -> Quantized:
        """What is stored of a latent matrix: it decodes to what `forward` gives."""
        scale, zero = self._tables()
        codes = _codes(self._groups(latent), scale, zero, *self._ends)
        if self.kept is not None:
            codes = torch.where(self._groups(self.kept), codes, zero)
        assert isinstance(self._form.scale, Dense)
        return replace(
            self._form,
            codes=codes.to(torch.int8).view(latent.shape),
            scale=Dense(scale[..., 0].to(self._form.scale.weight.dtype)),
            zero=None if self._zero is None else zero[..., 0].to(torch.int8),
        )

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points as they are stored, float32 [out, groups, 1]; gradients reach what is learned."""
        assert isinstance(self._form.scale, Dense)
        scale = as_stored(self._scale * self.factor.exp(), self._form.scale.weight.dtype)
        if self._zero is None or self.shift is None:
            return scale[..., None], torch.zeros_like(scale)[..., None]
        zero = straight_through(self._zero + self.shift, lambda exact: exact.round().clamp(*self._ends))
        return scale[..., None], zero[..., None]

    def _groups(self, values: Tensor) -> Tensor:
        return values.reshape(*self._scale.shape, -1)


def _codes(latent: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    return (latent / scale).add_(zero).round_().clamp_(low, high)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        """`latent` is [out, groups, size], both tables [out, groups, 1]; what backward needs is made there again."""
        ctx.save_for_backward(latent, scale, zero)
        ctx.ends = (low, high)
        return _codes(latent, scale, zero, low, high).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        latent, scale, zero = ctx.saved_tensors
        exact = (latent / scale).add_(zero)
        codes = exact.round()
        inside = (codes >= ctx.ends[0]) & (codes <= ctx.ends[1])
        passed = upstream * inside
        by_zero = (upstream - passed).sum(-1, keepdim=True) * -scale
        steps = torch.where(inside, codes - exact, codes.clamp_(*ctx.ends) - zero)
        return passed, (upstream * steps).sum(-1, keepdim=True), by_zero, None, None
