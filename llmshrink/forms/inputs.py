"""How the inputs of a linear are rounded before it multiplies them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink.forms.kinds import CodeKind, InputKind

LARGEST: dict[CodeKind, float] = {"int": 127.5, "float": 448.0}  # what the largest magnitude is divided by for a scale
LIMITS: dict[CodeKind, tuple[float, float]] = {"int": (-128.0, 127.0), "float": (-448.0, 448.0)}


@dataclass(frozen=True)
class InputScheme:
    """How the inputs of a linear are rounded to 8 bits before it multiplies them, symmetric around zero."""

    kind: InputKind
    scale: Tensor | None = None  # [1], in the dtype it is stored in; None: each token has its own (dynamic)
    threshold: float = 0.0  # of llm-int8: a feature in which a token reaches it is not rounded; 0: every feature is

    @property
    def words(self) -> str:
        """What it is, for a report."""
        kinds = {"int": "int8", "float": "fp8", "llm-int8": "LLM.int8", "bitnet": "BitNet"}
        return f"{kinds[self.kind]}, {'a scale for each token' if self.scale is None else 'a static scale'}"

    def round(self, x: Tensor) -> Tensor:
        """The inputs [..., tokens, in] that the rounded numbers mean, in the dtype of `x`.

        Int and float as in compressed-tensors 0.20 (`forward`): a token's own scale is its largest magnitude / 127.5,
        of float8 / 448, and the dtype's epsilon where that is 0.
        """
        if self.kind == "llm-int8":
            return _round_llm_int8(x, self.threshold)
        if self.kind == "bitnet":
            return _round_bitnet(x)
        if self.scale is None:
            low, high = torch.aminmax(x, dim=-1, keepdim=True)
            scale = torch.maximum(high, -low) / LARGEST[self.kind]
            scale = scale.masked_fill_(scale == 0, torch.finfo(x.dtype).eps)
        else:
            scale = self.scale.to(x.device, x.dtype)
        codes = (x / scale).clamp_(*LIMITS[self.kind])
        codes = codes.round_() if self.kind == "int" else codes.to(torch.float8_e4m3fn).to(x.dtype)
        return codes.mul_(scale)


# By which bitsandbytes 0.50 multiplies integers on a CPU (`backends/default/ops.py`): 1 / 127^2 but for a lost zero. Of
# what passes many layers so little decides which way numbers are rounded.
UNIT = 6.200124e-05


def _round_llm_int8(x: Tensor, threshold: float) -> Tensor:
    """LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339, section 3.2), as bitsandbytes 0.50 does it on a CPU."""
    half = x.half()
    outlier = half.abs() >= threshold if threshold else torch.zeros_like(half, dtype=torch.bool)
    half = half.masked_fill(outlier, 0)
    largest = half.abs().amax(-1, keepdim=True).float()
    rounded = (half * (127.0 / largest)).round_().nan_to_num_() * (largest * (127.0 * UNIT))
    return torch.where(outlier.any(-2, keepdim=True), x, rounded.to(x.dtype))


def _round_bitnet(x: Tensor) -> Tensor:
    """BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764, section 2), as `ActQuant` of transformers 5.23 does it."""
    share = 127 / x.float().abs().amax(-1, keepdim=True).clamp_(min=1e-5)
    return ((x.float() * share).round_().clamp_(-128, 127) / share).to(x.dtype)
