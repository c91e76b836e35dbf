"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): part of what makes inputs hard to round moves into the weights.

With x_j the largest magnitude of channel j on calibration text and w_j that of the weights on it, the channel is
divided by s_j = x_j^a / w_j^(1 - a) (equation 4), for what comes from a norm. It is meant for inputs of 8 bits.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from llmshrink.statistics import Peak
from llmshrink.transforms.base import Fed, Found, LinkKind, Scaling, TransformConfig, combined

LEAST = 1e-5  # of a magnitude


class SmoothQuantConfig(TransformConfig):
    """Settings of SmoothQuant."""

    alpha: float = Field(0.5, ge=0, le=1, description="how much of the difficulty moves from inputs to weights")


class SmoothQuant(Scaling[SmoothQuantConfig]):
    """Channel scales in closed form."""

    links: ClassVar[tuple[LinkKind, ...]] = ("norm",)
    needs = Peak
    Config: ClassVar[type[SmoothQuantConfig]] = SmoothQuantConfig

    def search(self, fed: list[Fed], repeats: tuple[int, int]) -> Found:
        """The scales of equation 4, whose geometric mean is one."""
        peaks = [tensor.gathered[Peak] for tensor in fed]
        x = torch.stack([peak.largest for peak in peaks if isinstance(peak, Peak)]).amax(0)
        w = torch.stack([read().abs().amax(0) for tensor in fed for read in tensor.read]).amax(0)
        x, w = (combined(each, repeats, lambda part: part.amax(1)).clamp(min=LEAST) for each in (x, w))
        alpha = self.config.alpha
        logarithm = alpha * x.log() - (1 - alpha) * w.log()
        return Found((logarithm - logarithm.mean()).exp())


TRANSFORM = SmoothQuant
