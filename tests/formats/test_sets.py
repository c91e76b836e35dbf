"""Sets of numbers: every bit where it belongs, and no more of them than said."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmshrink.formats.sets import bytes_of_set, pack_sets, unpack_sets


@given(st.integers(1, 60), st.integers(1, 200_000), st.integers(0, 2**31))
def test_sets_come_back(count: int, limit: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sets = torch.randint(limit, (3, count), generator=generator).sort(-1).values  # numbers may come twice
    packed = pack_sets(sets, limit)
    assert packed.shape == (3, bytes_of_set(count, limit))
    assert torch.equal(unpack_sets(packed, count, limit), sets)
    if count < limit:
        assert packed.shape[1] <= (count * (2 + math.log2(limit / count)) + 2) / 8 + 1


def test_bits_are_where_the_docstring_says() -> None:
    packed = pack_sets(torch.tensor([[1, 6, 7, 11]]), 16)[0].tolist()  # two low bits each, four steps
    bits = [byte >> place & 1 for byte in packed for place in range(8)]
    assert bits[:8] == [1, 0, 1, 1, 0, 1, 0, 0]  # 0 + 0, 1 + 1, 1 + 2, 2 + 3
    assert bits[8:16] == [1, 0, 0, 1, 1, 1, 1, 1] and len(bits) == 16


def test_other_bytes_are_refused() -> None:
    packed = pack_sets(torch.tensor([[1, 6, 7, 11]]), 16)
    with pytest.raises(ValueError, match="no sets of 4 numbers"):
        unpack_sets(packed ^ 1, 4, 16)
