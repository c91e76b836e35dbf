"""Which scale static inputs get: one number for a linear, from the magnitudes that calibration rows gave it.

Static scales clip what is larger than anything seen, or than most of it; dynamic ones are found anew for each token and
need no data. Formulas are those of compressed-tensors: scale = magnitude / 127.5 for int8, / 448 for float8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmshrink.forms import LARGEST, CodeKind, Event, InputScheme
from llmshrink.statistics import Range

Observer = Literal["minmax", "percentile", "mse"]
PERCENTILE = 0.9999  # of all magnitudes that `percentile` does not clip
TIGHTEST, CLIPS = 1 / 16, 80  # the smallest magnitude that `mse` clips at, as a share of the largest; how many it tries


@dataclass(frozen=True)
class Inputs:
    """How the inputs of one matrix are to be rounded."""

    kind: CodeKind
    observer: Observer | None = None  # of static scales; None: dynamic

    def scheme(self, seen: Range | None, dtype: torch.dtype) -> tuple[InputScheme, Event | None]:
        """The scheme, and what to tell of it.

        Args:
            seen: the inputs of calibration rows; None where scales are dynamic.
            dtype: what a static scale is stored in.
        """
        if self.observer is None or seen is None:
            return InputScheme(self.kind), None
        scale = (_clip(seen, self.kind, self.observer) / LARGEST[self.kind]).to(dtype)
        if bool(scale.isfinite() & (scale >= torch.finfo(dtype).tiny)):
            return InputScheme(self.kind, scale), None
        message = "its static scale is 1: no calibration token reached it, or all its inputs were 0"
        return InputScheme(self.kind, torch.ones_like(scale)), Event("no_inputs", message)

    def meta(self, dtype: torch.dtype) -> InputScheme:
        """The same structure on the `meta` device."""
        return InputScheme(self.kind, None if self.observer is None else torch.empty(1, dtype=dtype, device="meta"))


def _clip(seen: Range, kind: CodeKind, observer: Observer) -> Tensor:
    """The magnitude [1] that just need not be clipped: float32."""
    if observer == "minmax" or not float(seen.largest):
        return seen.largest
    ends, middles, counts = seen.bins()
    if observer == "percentile":
        enough = counts.cumsum(0) >= PERCENTILE * counts.sum()
        return torch.minimum(ends[enough][:1], seen.largest)
    clips = seen.largest * torch.logspace(0, 1, CLIPS, base=TIGHTEST, device=ends.device)
    errors = [
        (InputScheme(kind, clip / LARGEST[kind]).round(middles) - middles).square().double() @ counts.double()
        for clip in clips.unbind()
    ]
    return clips[torch.stack(errors).argmin(), None]


__all__ = ["Inputs", "Observer"]
