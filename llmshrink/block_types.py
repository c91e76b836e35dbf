"""The block types of GGUF, as data: what the search for scales and the layout of bits must agree on.

A row is cut into blocks, a block into groups. A weight means `scale * code`, less a minimum where the type has one. In
the k-quants the scales of a block (and its minima) are small integers under one float16 for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BlockName = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"]


@dataclass(frozen=True)
class BlockType:
    """What one block stores."""

    size: int  # weights of a block: the width of a matrix is a multiple of it
    bytes: int  # of a block
    bits: int  # of a code
    group: int  # adjacent weights that share a scale
    minimum: bool = False  # codes count from 0 and a minimum is subtracted; else codes are signed
    nested: int | None = None  # bits of a scale and of a minimum under the block's float16; None: they are float16
    levels: tuple[float, ...] | None = None  # what the codes mean where that is not the integers of `bits`

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code that is used, both included."""
        if self.levels is not None:
            return -1, 1
        if self.minimum:
            return 0, (1 << self.bits) - 1
        high = (1 << self.bits - 1) - 1
        return (-high if self.bits == 8 else -high - 1), high  # processors' products of bytes shun -128

    @property
    def scale_range(self) -> tuple[int, int]:
        """Lowest and highest integer of a nested scale, both included."""
        assert self.nested is not None
        if self.minimum:
            return 0, (1 << self.nested) - 1
        return -(1 << self.nested - 1), (1 << self.nested - 1) - 1


BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(32, 18, 4, 32),
    "Q4_1": BlockType(32, 20, 4, 32, minimum=True),
    "Q5_0": BlockType(32, 22, 5, 32),
    "Q5_1": BlockType(32, 24, 5, 32, minimum=True),
    "Q8_0": BlockType(32, 34, 8, 32),
    "Q2_K": BlockType(256, 84, 2, 16, minimum=True, nested=4),
    "Q3_K": BlockType(256, 110, 3, 16, nested=6),
    "Q4_K": BlockType(256, 144, 4, 32, minimum=True, nested=6),
    "Q5_K": BlockType(256, 176, 5, 32, minimum=True, nested=6),
    "Q6_K": BlockType(256, 210, 6, 16, nested=8),
    # Three of the four values that two bits can hold, five of them in a byte or four.
    "TQ1_0": BlockType(256, 54, 2, 256, levels=(-1, 0, 1)),
    "TQ2_0": BlockType(256, 66, 2, 256, levels=(-1, 0, 1, 2)),
}
