"""A run may end anywhere: its output is absent or complete, and the same recipe again gives the same bytes."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_server import CrashServer, Ended
from helpers import SMALL, SMALL_METHOD, assert_complete, content, recipe

from llmshrink.io.files import KILLED
from llmshrink.recipe.schema import Recipe

SAMPLED, RANDOM_KILLS, ALL_RANDOM_KILLS = 8, 3, 30


@pytest.fixture(scope="module")
def server() -> Iterator[CrashServer]:
    with CrashServer() as found:
        yield found


class Case:
    """One recipe for the server, and what an unbroken run of it gives."""

    def __init__(self, server: CrashServer, wanted: Recipe, folder: Path) -> None:
        self._server, self.folder, self._count = server, folder, 0
        self._data = json.loads(wanted.model_dump_json(exclude_unset=True))
        self.unbroken = self.run("unbroken")
        assert self.unbroken.code == 0, self.unbroken.message
        self.expected = content(folder / "unbroken")

    def run(self, name: str, **how: Any) -> Ended:
        return self._server.run({**self._data, "output": str(self.folder / name)}, **how)

    def survives(self, **how: Any) -> None:
        """A run that is killed, then the same run again."""
        self._count += 1
        name = f"out{self._count}"
        out = self.folder / name
        ended = self.run(name, **how)
        assert ended.code in (KILLED, -signal.SIGKILL, 0), ended
        complete = out.exists()
        if complete:
            assert_complete(out, killed=True)
        again = self.run(name)
        assert again.code == (7 if complete else 0), (how, again)
        assert_complete(out)
        assert content(out) == self.expected, how
        assert {p.name for p in self.folder.iterdir()} == {"unbroken", name}, how
        shutil.rmtree(out)


@pytest.fixture(scope="module", params=["dense"])
def case(
    server: CrashServer,
    smallest: Path,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Case:
    sections = {**SMALL, "stage": {"format": {"name": request.param}}}
    folder = tmp_path_factory.mktemp("cases")
    return Case(server, recipe(smallest, folder, text_file, SMALL_METHOD, **sections), folder)


every_format = pytest.mark.parametrize("case", ["dense", "compressed-tensors"], indirect=True)


# --- killed


def test_a_run_killed_between_durable_steps_resumes_to_the_same_bytes(case: Case) -> None:
    last = case.unbroken.steps
    assert last > 50  # the hook is in place
    for index in range(SAMPLED):
        case.survives(crash_at=1 + index * (last - 1) // (SAMPLED - 1))


@pytest.mark.slow
@every_format
def test_every_durable_step_can_be_the_last(case: Case) -> None:
    for step in range(1, case.unbroken.steps + 1):
        case.survives(crash_at=step)


def kill_at_random(case: Case, times: int) -> None:
    moments = random.Random(5)
    for _ in range(times):
        case.survives(kill_after=moments.uniform(0.0, case.unbroken.seconds))


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(case: Case) -> None:
    kill_at_random(case, RANDOM_KILLS)


@pytest.mark.slow
@every_format
def test_many_random_kills(case: Case) -> None:
    kill_at_random(case, ALL_RANDOM_KILLS)


def test_a_kill_between_the_two_renames_of_overwrite_brings_the_old_output_back(case: Case) -> None:
    out = case.folder / "old"
    out.mkdir()
    (out / "precious").write_text("old")
    (out / "llmshrink-manifest.json").touch()  # made by llmshrink: nothing else is ever replaced
    ended = case.run("old", overwrite=True, crash_at=case.unbroken.steps - 1)  # the old output moved, the new one not
    assert ended.code == KILLED and not out.exists()
    refused = case.run("old")
    assert refused.code == 7 and "exists already" in refused.message
    assert (out / "precious").read_text() == "old"
    assert case.run("old", overwrite=True).code == 0
    assert_complete(out)
    assert content(out) == case.expected
    assert {p.name for p in case.folder.iterdir()} == {"unbroken", "old"}
    shutil.rmtree(out)
