"""Sets of numbers in few bits: in rising order, low bits as they are and high bits as steps (Elias 1974; Fano 1971).

k numbers below n take k (2 + log2(n / k)) bits at most, where no code takes less than k (1.44 + log2(n / k)) of most
sets. With l low bits, number i of a set has the bit i + (number >> l) set in the first k + ((n - 1) >> l) + 1 bits of
its row, and its low bits, least significant first, in l bits of the k l that follow; of a byte the lowest bit is first.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def bytes_of_set(count: int, limit: int) -> int:
    """Bytes of `count` numbers below `limit`."""
    low, high = _bits(count, limit)
    return math.ceil((high + count * low) / 8)


def pack_sets(numbers: Tensor, limit: int) -> Tensor:
    """Sets int64 [rows, count] of numbers below `limit`, in rising order -> uint8 [rows, bytes_of_set]."""
    rows, count = numbers.shape
    low, high = _bits(count, limit)
    places = (numbers >> low) + torch.arange(count)
    steps = torch.zeros(rows, high, dtype=torch.bool).scatter_(1, places, value=True)
    rest = (numbers[..., None] >> torch.arange(low) & 1).bool().flatten(1)
    bits = torch.cat([steps, rest], dim=1).numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))


def unpack_sets(packed: Tensor, count: int, limit: int) -> Tensor:
    """The inverse of `pack_sets`.

    Raises:
        ValueError: they are no sets of so many numbers.
    """
    low, high = _bits(count, limit)
    bits = np.unpackbits(packed.numpy(), axis=1, count=high + count * low, bitorder="little")
    row, place = np.nonzero(bits[:, :high])
    if not np.array_equal(row, np.repeat(np.arange(len(packed)), count)):
        raise ValueError(f"these are no sets of {count} numbers")
    steps = torch.from_numpy(place).view(-1, count) - torch.arange(count)
    rest = torch.from_numpy(bits[:, high:]).view(len(packed), count, low).long() << torch.arange(low)
    return (steps << low) + rest.sum(-1)


def _bits(count: int, limit: int) -> tuple[int, int]:
    """Low bits of each number, and the bits that hold the steps of all."""
    low = max(0, (limit // count).bit_length() - 1)
    return low, count + (limit - 1 >> low) + 1
