"""Orthogonal matrices that mix all channels: a Hadamard matrix times random signs, for any width.

Of a width 2^k m with m odd it is the Kronecker product of the Hadamard matrix of 2^k and a random orthogonal one of m.
It is applied by additions of pairs and by sums in a fixed order, never by a matrix product: so every row of a matrix
gets the same bits, whatever stretch of rows it comes in and however many threads work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Rotation:
    """Turns every stretch of `width` channels of the last dimension by an orthogonal Q [width, width]."""

    def __init__(self, width: int, seed: int) -> None:
        """`seed` is of the signs, and of the part that is no power of two."""
        generator = torch.Generator().manual_seed(seed)
        self.width = width
        self._power = width & -width  # the largest power of two in it
        self._signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        odd = width // self._power
        q, r = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
        self._odd = q * r.diagonal().sign()  # uniform among all orthogonal matrices

    def produced(self, x: Tensor) -> Tensor:
        """The product x Q, in x's dtype."""
        return self._mixed(x.reshape(-1, self.width) * self._signs.to(x.device, x.dtype), self._odd).view(x.shape)

    def consumed(self, weight: Tensor) -> Tensor:
        """The product W Q^-T, which is W Q."""
        return self.produced(weight)

    def repeated(self, times: int, size: int) -> Rotation:
        """The same: each head is turned by itself."""
        return self

    def back(self, x: Tensor) -> Tensor:
        """The product x Q^T: what `produced` was given."""
        mixed = self._mixed(x.reshape(-1, self.width), self._odd.T)
        return (mixed * self._signs.to(x.device, x.dtype)).view(x.shape)

    def _mixed(self, x: Tensor, odd: Tensor) -> Tensor:
        """Rows [n, width] times the Kronecker product of a Hadamard matrix, which is symmetric, and `odd`."""
        x = x.view(-1, self._power, len(odd))
        if len(odd) > 1:
            total = torch.zeros_like(x)
            for i, row in enumerate(odd.to(x.device, x.dtype)):
                total += x[..., i : i + 1] * row
            x = total
        step = 1
        while step < self._power:  # Sylvester's matrix, pair by pair
            pairs = x.view(len(x), -1, 2, step * len(odd))
            x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
            step *= 2
        return x.reshape(-1, self.width) / math.sqrt(self._power)
