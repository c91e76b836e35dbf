"""A run may be killed anywhere: its output is absent or complete, and the same recipe again gives the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from crash_case import CASES, KILLS, Case

from llmshrink.engine.workspace import MANIFEST
from llmshrink.io.files import KILLED

SAMPLED, RANDOM_KILLS, ALL_RANDOM_KILLS = 3, 1, 30

every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_a_run_killed_between_durable_steps_resumes_to_the_same_bytes(
    cases: Callable[[str], Case], name: str, request: pytest.FixtureRequest
) -> None:
    case = cases(name)
    assert case.unbroken.steps > 50  # the hook is in place
    for step in random.Random(name).sample(range(1, case.unbroken.steps + 1), SAMPLED):
        case.survives(*KILLS, crash_at=step)


@pytest.mark.faults
@every_case
def test_every_durable_step_can_be_the_last(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    for step in range(1, case.unbroken.steps + 1):
        assert case.survives(*KILLS, crash_at=step).code == KILLED


def kill_at_random(case: Case, times: int) -> None:
    moments = random.Random(5)
    for _ in range(times):
        case.survives(*KILLS, kill_after=moments.uniform(0.0, case.seconds))


@every_case
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(cases: Callable[[str], Case], name: str) -> None:
    kill_at_random(cases(name), RANDOM_KILLS)


@pytest.mark.faults
@every_case
def test_many_random_kills(cases: Callable[[str], Case], name: str) -> None:
    kill_at_random(cases(name), ALL_RANDOM_KILLS)


def test_a_kill_between_the_two_renames_of_overwrite_brings_the_old_output_back(cases: Callable[[str], Case]) -> None:
    case = cases("gptq-dense")
    out = case.new_folder() / "out"
    out.mkdir()
    (out / "precious").write_text("old")
    (out / MANIFEST).touch()  # made by llmshrink: nothing else is ever replaced
    ended = case.run(out, overwrite=True, crash_at=case.unbroken.steps - 1)  # the old output moved, the new one not
    assert ended.code == KILLED and not out.exists()
    refused = case.run(out)
    assert refused.code == 7 and "exists already" in refused.message
    assert (out / "precious").read_text() == "old"
    assert case.run(out, overwrite=True).code == 0
    case.finishes(out, "overwrite")
