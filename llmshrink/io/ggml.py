"""The types of ggml's tensors: how many values make a block, and the bytes it takes.

Source: https://github.com/ggml-org/ggml, ggml-common.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Type(NamedTuple):
    """How values of a tensor are stored."""

    code: int  # in the file
    values: int  # of a block
    bytes: int  # of a block


TYPES = {
    "F32": Type(0, 1, 4),
    "F16": Type(1, 1, 2),
    "Q4_0": Type(2, 32, 18),
    "Q4_1": Type(3, 32, 20),
    "Q5_0": Type(6, 32, 22),
    "Q5_1": Type(7, 32, 24),
    "Q8_0": Type(8, 32, 34),
    "Q8_1": Type(9, 32, 40),
    "Q2_K": Type(10, 256, 84),
    "Q3_K": Type(11, 256, 110),
    "Q4_K": Type(12, 256, 144),
    "Q5_K": Type(13, 256, 176),
    "Q6_K": Type(14, 256, 210),
    "Q8_K": Type(15, 256, 292),
    "IQ2_XXS": Type(16, 256, 66),
    "IQ2_XS": Type(17, 256, 74),
    "IQ3_XXS": Type(18, 256, 98),
    "IQ1_S": Type(19, 256, 50),
    "IQ4_NL": Type(20, 32, 18),
    "IQ3_S": Type(21, 256, 110),
    "IQ2_S": Type(22, 256, 82),
    "IQ4_XS": Type(23, 256, 136),
    "I8": Type(24, 1, 1),
    "I16": Type(25, 1, 2),
    "I32": Type(26, 1, 4),
    "I64": Type(27, 1, 8),
    "F64": Type(28, 1, 8),
    "IQ1_M": Type(29, 256, 56),
    "BF16": Type(30, 1, 2),
    "TQ1_0": Type(34, 256, 54),
    "TQ2_0": Type(35, 256, 66),
    "MXFP4": Type(39, 32, 17),
    "NVFP4": Type(40, 64, 36),
    "Q1_0": Type(41, 128, 18),
}
"""Every type of ggml by its name."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
"""The types that torch has; tensors of all others are bytes."""


@dataclass(frozen=True)
class Entry:
    """What a file says of one tensor."""

    name: str
    type: str
    shape: tuple[int, ...]  # in values, slowest first as in torch

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that stores it."""
        return DTYPES.get(self.type, torch.uint8)

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the tensor that stores it: the last dimension of a quantized one is the bytes of a row."""
        kind = TYPES[self.type]
        return self.shape if self.type in DTYPES else (*self.shape[:-1], self.shape[-1] // kind.values * kind.bytes)

    @property
    def bytes(self) -> int:
        """Bytes of the data, without padding."""
        return math.prod(self.stored) * self.dtype.itemsize
