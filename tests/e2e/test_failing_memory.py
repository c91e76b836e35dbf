"""Memory runs out, anywhere: exit 6 or a finished run, never a broken output, and the same bytes afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from crash_case import CASES, Case
from crash_server import Ended
from injected import OUT_OF_MEMORY

SAMPLED, MORE = 2, 60
LEVELS = 10
# Bytes of address space beyond those of the process that waits: more than any run here takes. Less than a MiB is not
# tried: CPython itself then waits for ever for a thread that died at its birth.
ENOUGH = 16 << 20


def told(ended: Ended) -> None:
    assert ended.code == 6 and "Memory ran out: " in ended.message and "is kept" in ended.message, ended


def fail(case: Case, kind: str, times: int) -> None:
    pick = random.Random(kind)
    for at in pick.sample(range(1, case.unbroken.counts["operations"] + 1), times):
        case.survives(6, check=told, memory={"kind": kind, "at": at, "sticky": pick.random() < 0.5})


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_an_allocation_that_fails_ends_the_run_with_6_or_not_at_all(cases: Callable[[str], Case], kind: str) -> None:
    fail(cases("gptq-compressed-tensors"), kind, SAMPLED)


@pytest.mark.faults
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
@pytest.mark.parametrize("name", CASES)
def test_many_allocations_may_fail(cases: Callable[[str], Case], name: str, kind: str) -> None:
    fail(cases(name), kind, MORE)


@pytest.mark.parametrize("level", [1, 3])
def test_an_address_space_that_ends_costs_no_finished_work(cases: Callable[[str], Case], level: int) -> None:
    cases("gptq-dense").survives(6, check=told, limits=[["RLIMIT_AS", ENOUGH * level // LEVELS]])


@pytest.mark.faults
@pytest.mark.parametrize("level", range(1, LEVELS + 1))
@pytest.mark.parametrize("name", CASES)
def test_an_address_space_of_any_size(cases: Callable[[str], Case], name: str, level: int) -> None:
    ended = cases(name).survives(6, check=told, limits=[["RLIMIT_AS", ENOUGH * level // LEVELS]])
    assert ended.code == 0 or level < LEVELS
