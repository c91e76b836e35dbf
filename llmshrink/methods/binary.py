"""Binary weights: every weight becomes -s or s, with the scale s of its group (Rastegari 2016, arXiv 1603.05279).

Worth having after training that knows of it, like `ternary`. The least squared error is at s = mean |w| (equation 6 of
the paper). No loader of plain checkpoints reads codes of one bit: they are stored in two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods.ternary import Ternary


class Binary(Ternary):
    """The signs of the weights, and the scales that are nearest to them."""

    caution = "binary weights suit models that were trained for them (quantization-aware training); codes take two bits"

    learnable = False  # there is no zero

    @staticmethod
    def fit(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales [rows, groups], as they are stored in `dtype`, and codes of float32 weights [rows, groups, group]."""
        scale = w.abs().mean(2, dtype=torch.float64).to(dtype).float()
        return scale, torch.where(w < 0, -1.0, 1.0)


METHOD = Binary
