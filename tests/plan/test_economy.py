"""What is done to take less memory, and in which order."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmshrink.plan.economy import Economy, choose, passes

FIRST = Economy(1024)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.integers(0, 200))
def test_passes_hold_all_in_order_and_as_little_as_was_asked(sizes: list[int], most: int) -> None:
    found = passes(sizes, most)
    assert [size for part in found for size in sizes[part]] == sizes
    assert all(part.stop - part.start == 1 or sum(sizes[part]) <= most for part in found)
    # None could have been joined to the one before it.
    assert all(sum(sizes[a]) + sizes[b.start] > most for a, b in pairwise(found))


def test_without_a_bound_there_is_one_pass() -> None:
    assert passes([3, 4], None) == [slice(0, 2)] == passes([3, 4], 7)


def test_batches_stay_as_they_are_unless_that_is_allowed() -> None:
    found = list(FIRST.thriftier(row=100, statistics=8 << 20, batches=False))
    assert found[:2] == [FIRST, Economy(1024, on_disk=True)]
    assert {(e.batch_tokens, e.logits) for e in found} == {(1024, FIRST.logits)}
    assert [e.statistics for e in found[2:]] == [4 << 20, 2 << 20, 1 << 20]


def test_every_step_takes_no_more_than_the_one_before() -> None:
    found = list(FIRST.thriftier(row=100, statistics=8 << 20, batches=True))
    assert found[-1] == Economy(100, FIRST.logits >> 4, True, 1 << 20)
    for one, other in pairwise(found):
        assert other != one
        assert (other.batch_tokens, other.logits, -other.on_disk) <= (one.batch_tokens, one.logits, -one.on_disk)
        assert (other.statistics or 9 << 20) <= (one.statistics or 9 << 20)


@pytest.mark.parametrize(("limit", "expected"), [(2000, 1024), (600, 512), (1, 100)])
def test_the_first_that_fits_is_chosen_or_the_last(limit: int, expected: int) -> None:
    economies = FIRST.thriftier(row=100, statistics=0, batches=True)
    assert choose(lambda e: e.batch_tokens, economies, limit)[0].batch_tokens == expected


def test_what_is_done_is_told() -> None:
    assert FIRST.told("compress") == []
    (event,) = Economy(256, FIRST.logits // 4, True, 1 << 20).told("compress")
    assert event.kind == "economy"
    assert "a file, 256 tokens in a forward pass, statistics gathered in several passes" in event.message
