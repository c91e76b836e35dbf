"""What a method may ask to know about the inputs of a linear, gathered while calibration rows pass through a block.

Each statistic sees batches of inputs `x` [tokens, in] in float32 and keeps a fixed number of bytes, whatever the
number of rows. Linears fed by the same tensor share one instance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

# Columns of one tile of the Hessian: only the tiles on and above the diagonal are multiplied. Narrow ones leave less to
# multiply twice, but below a wide row they are slower (a third at 4096).
TILE, NARROW_TILE, NARROW = 256, 64, 1024
CUT = 17  # bits of a float32 that are left out of the histogram of magnitudes


class Statistic(Protocol):
    """Gathered over batches; `tokens` counts the rows seen."""

    tokens: int

    def __init__(self, width: int, device: torch.device) -> None: ...

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs [tokens, in], float32."""

    def finish(self) -> None:
        """Called once after the last batch."""

    def to(self, device: torch.device) -> None:
        """Move what was gathered to another device."""

    @staticmethod
    def bytes(width: int) -> int:
        """Memory of one instance for a linear of this input width."""


Gathered = dict[type[Statistic], Statistic]  # what was gathered of one input, by kind


class Norm:
    """Mean square of each input feature: `square` [in], float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.square = torch.zeros(width, device=device)

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs [tokens, in], float32."""
        self.tokens += x.shape[0]
        self.square += x.square().sum(0)

    def finish(self) -> None:
        """Turn the sum into a mean."""
        self.square /= max(self.tokens, 1)

    def to(self, device: torch.device) -> None:
        """Move what was gathered to another device."""
        self.square = self.square.to(device)

    @staticmethod
    def bytes(width: int) -> int:
        """Memory of one instance for a linear of this input width."""
        return 4 * width


class Moments(Norm):
    """Mean square of each input feature, and its mean: `mean` [in], float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.mean = torch.zeros(width, device=device)

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs [tokens, in], float32."""
        super().update(x)
        self.mean += x.sum(0)

    def finish(self) -> None:
        """Turn the sums into means."""
        super().finish()
        self.mean /= max(self.tokens, 1)

    def to(self, device: torch.device) -> None:
        """Move what was gathered to another device."""
        super().to(device)
        self.mean = self.mean.to(device)

    @staticmethod
    def bytes(width: int) -> int:
        """Memory of one instance for a linear of this input width."""
        return 2 * Norm.bytes(width)


class Magnitude:
    """Mean magnitude of each input feature: `mean` [in], float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.mean = torch.zeros(width, device=device)

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs [tokens, in], float32."""
        self.tokens += x.shape[0]
        self.mean += x.abs().sum(0)

    def finish(self) -> None:
        """Turn the sum into a mean."""
        self.mean /= max(self.tokens, 1)

    def to(self, device: torch.device) -> None:
        """Move what was gathered to another device."""
        self.mean = self.mean.to(device)

    @staticmethod
    def bytes(width: int) -> int:
        """Memory of one instance for a linear of this input width."""
        return 4 * width


class Peak:
    """The largest magnitude of each input feature: `largest` [in], float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.largest = torch.zeros(width, device=device)

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs [tokens, in], float32."""
        self.tokens += x.shape[0]
        if x.numel():
            torch.maximum(self.largest, x.abs().amax(0), out=self.largest)

    def finish(self) -> None:
        """Nothing to do."""

    def to(self, device: torch.device) -> None:
        """Move what was gathered to another device."""
        self.largest = self.largest.to(device)

    @staticmethod
    def bytes(width: int) -> int:
        """Memory of one instance for a linear of this input width."""
        return 4 * width


class Range:
    """How large inputs are, whatever the feature: a histogram of |x| over float32 cut to 6 bits of mantissa.

    Bins follow each other as numbers do, each 1/64 of a power of two wide: none needs to be known before the data.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.largest = torch.zeros(1, device=device)  # exact
        self.counts = torch.zeros(1 << 31 - CUT, dtype=torch.int64, device=device)

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs [tokens, in], float32."""
        self.tokens += x.shape[0]
        if x.numel():
            magnitudes = x.abs().flatten()
            torch.maximum(self.largest, magnitudes.amax(), out=self.largest)
            self.counts += torch.bincount(magnitudes.view(torch.int32) >> CUT, minlength=len(self.counts))

    def finish(self) -> None:
        """Nothing to do."""

    def to(self, device: torch.device) -> None:
        """Move what was gathered to another device."""
        self.largest, self.counts = self.largest.to(device), self.counts.to(device)

    def bins(self) -> tuple[Tensor, Tensor, Tensor]:
        """The upper end and the middle of each bin that is not empty, float32, and how many magnitudes lie in it."""
        filled = self.counts.nonzero().flatten()
        low, high = ((filled + step << CUT).to(torch.int32).view(torch.float32) for step in (0, 1))
        return high, (low + high) / 2, self.counts[filled]

    @staticmethod
    def bytes(width: int) -> int:
        """Memory of one instance for a linear of this input width."""
        return 8 * (1 << 31 - CUT) + 4


class Hessian:
    """Mean of x x^T over the calibration tokens: `matrix` [in, in], float32, symmetric.

    This is the Hessian of the layer's squared output error with respect to one row of its weight, up to the factor 2
    that cancels everywhere it is used (Frantar et al. 2022, arXiv 2210.17323, section 3). Only the upper tiles are
    accumulated; `finish` mirrors them.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.matrix = torch.zeros(width, width, device=device)

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs [tokens, in], float32."""
        self.tokens += x.shape[0]
        for start, stop in self._tiles():
            self.matrix[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def finish(self) -> None:
        """Mirror the upper triangle and turn the sum into a mean."""
        for start, stop in self._tiles():
            self.matrix[stop:, start:stop] = self.matrix[start:stop, stop:].T
        self.matrix /= max(self.tokens, 1)

    def to(self, device: torch.device) -> None:
        """Move what was gathered to another device."""
        self.matrix = self.matrix.to(device)

    def _tiles(self) -> Iterator[tuple[int, int]]:
        width = len(self.matrix)
        tile = NARROW_TILE if width < NARROW else TILE
        return ((start, min(start + tile, width)) for start in range(0, width, tile))

    @staticmethod
    def bytes(width: int) -> int:
        """Memory of one instance for a linear of this input width."""
        return 4 * width * width


class Fisher(Hessian):
    """The same, its tokens weighed by what errors cost there: `update` gets inputs times the root of that."""


class Cross(Hessian):
    """A Hessian, and how far the inputs are from those of the original model: `shift` [in, in], float32.

    With x an input and y the one that the original's layer gets for the same token, `shift` is the mean of
    (y - x) x^T: what GPTAQ (Li et al. 2025, arXiv 2504.02692) calls the asymmetric part of the calibration.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.shift = torch.zeros(width, width, device=device)

    def pair(self, x: Tensor, original: Tensor) -> None:
        """Add a batch of inputs, and those of the original for the same tokens; both [tokens, in], float32."""
        self.update(x)
        self.shift.addmm_((original - x).T, x)

    def finish(self) -> None:
        """Turn the sums into means."""
        super().finish()
        self.shift /= max(self.tokens, 1)

    def to(self, device: torch.device) -> None:
        """Move what was gathered to another device."""
        super().to(device)
        self.shift = self.shift.to(device)

    @staticmethod
    def bytes(width: int) -> int:
        """Memory of one instance for a linear of this input width."""
        return 2 * Hessian.bytes(width)


class NoStatistic:
    """For methods that look at the weight alone."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Count the tokens."""
        self.tokens += x.shape[0]

    def finish(self) -> None:
        """Nothing to do."""

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    @staticmethod
    def bytes(width: int) -> int:
        """No memory."""
        return 0
