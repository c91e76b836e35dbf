"""Rotations by Hadamard matrices (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456): no channel stands out any more.

The states between blocks are turned by one matrix, the values of each head by another (R1 and R2 of SpinQuant, arXiv
2405.16406), and the weights on both sides take the turn back. Nothing is computed at run time that was not before.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmshrink.transforms.base import Rotating, RotatingConfig
from llmshrink.transforms.rotation import Rotation


class HadamardConfig(RotatingConfig):
    """Settings of the rotations."""

    seed: int = Field(0, ge=0, description="of the random signs")


class Hadamard(Rotating[HadamardConfig]):
    """Random Hadamard matrices."""

    Config: ClassVar[type[HadamardConfig]] = HadamardConfig

    def stream(self, width: int) -> Rotation:
        """The rotation of states of this width."""
        return Rotation(width, self.config.seed)

    def values(self, width: int) -> Rotation:
        """The rotation of the values of a head of this width."""
        return Rotation(width, self.config.seed + 1)


TRANSFORM = Hadamard
