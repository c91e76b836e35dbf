"""Drop weights at random: what any criterion must beat."""

from __future__ import annotations

import zlib
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.methods.base import MethodConfig, Prepared
from llmshrink.methods.sparsity import RowConfig, ScoreMethod


class RandomConfig(RowConfig):
    """Settings of random pruning."""

    seed: int = Field(0, ge=0, description="which weights go")


class Random(ScoreMethod):
    """Random pruning, the same for the same weights."""

    Config: ClassVar[type[MethodConfig]] = RandomConfig
    by_row = False  # the checksum is that of the whole matrix

    def score(self, weight: Tensor, prepared: Prepared) -> Tensor:
        """Uniform numbers [out, in], from the seed and a checksum of the weights: each matrix has others."""
        assert isinstance(self.config, RandomConfig)
        seed = self.config.seed + (zlib.crc32(weight.cpu().contiguous().numpy().tobytes()) << 16)
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)


METHOD = Random
