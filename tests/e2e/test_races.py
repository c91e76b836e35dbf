"""Eight whole runs of one recipe at once."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from crash_case import Case

RACERS = 8


def race(case: Case, times: int) -> None:
    for _ in range(times):
        out = case.new_folder() / "out"
        ended = sorted(case.race(out, RACERS))
        assert [racer.code for racer in ended] == [0] + [7] * (RACERS - 1), ended
        for refused in ended[1:]:
            assert re.search(r"another run( \(process \d+ on .*\))?\.|/out exists already", refused.message), refused
        case.finishes(out, "a race")


def test_one_of_eight_runs_wins(cases: Callable[[str], Case]) -> None:
    race(cases("gptq-dense"), 1)


@pytest.mark.faults
def test_one_of_eight_runs_wins_each_time(cases: Callable[[str], Case]) -> None:
    race(cases("gptq-compressed-tensors"), 50)
