"""Many processes, one output: never two holders, and exactly one result."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from llmshrink.engine.workspace import MANIFEST, Workspace
from llmshrink.errors import OutputError
from llmshrink.io.files import write_bytes

FORK = multiprocessing.get_context("fork")
RACERS = 8
WON, REFUSED, KILLED, TWO_HOLDERS = 0, 7, -signal.SIGKILL, 99


def codes(job: Callable[..., int], *arguments: Any) -> list[int]:
    """How processes end that all begin together."""
    barrier = FORK.Barrier(RACERS)
    racers = [FORK.Process(target=_race, args=(barrier, job, i, *arguments)) for i in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    return [racer.exitcode for racer in racers if racer.exitcode is not None]


def _race(barrier: Barrier, job: Callable[..., int], *arguments: Any) -> None:
    barrier.wait()
    os._exit(job(*arguments))


def one_result(number: int, output: Path) -> int:
    try:
        with Workspace(output) as workspace:
            workspace.begin({"recipe": 1}, resume=True)
            write_bytes(workspace.folder / "weights", b"the same whoever wins")
            workspace.commit()
    except OutputError as error:
        known = any(words in str(error) for words in ("another run", "exists already"))
        return REFUSED if known else 1
    return WON


def holds_alone(number: int, output: Path, seconds: float) -> int:
    """Take the lock again and again; the file `inside` is there while somebody holds it. Some die holding it."""
    pick, end = random.Random(number), time.monotonic() + seconds
    inside = output.with_name("inside")
    while time.monotonic() < end:
        with suppress(OutputError), Workspace(output):
            try:
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return TWO_HOLDERS
            time.sleep(pick.random() / 1000)
            inside.unlink()
            if number < RACERS // 2 and pick.random() < 0.01:
                os.kill(os.getpid(), signal.SIGKILL)
    return WON


def race_for_one(folder: Path, times: int) -> None:
    for number in range(times):
        output = folder / f"{number}" / "out"
        assert sorted(codes(one_result, output)) == [WON] + [REFUSED] * (RACERS - 1)
        assert [path.name for path in output.parent.iterdir()] == ["out"]
        assert {path.name for path in output.iterdir()} == {"weights", MANIFEST}


def test_one_of_eight_makes_the_output(tmp_path: Path) -> None:
    race_for_one(tmp_path, 5)


@pytest.mark.faults
def test_one_of_eight_makes_the_output_each_time(tmp_path: Path) -> None:
    race_for_one(tmp_path, 300)


@pytest.mark.parametrize("seconds", [2, pytest.param(120, marks=pytest.mark.faults)])
def test_there_are_never_two_holders(tmp_path: Path, seconds: float) -> None:
    ended = codes(holds_alone, tmp_path / "out", seconds)
    assert set(ended) <= {WON, KILLED} and WON in ended
    with Workspace(tmp_path / "out"):  # what the dead left behind keeps nobody out
        pass
    assert list(tmp_path.iterdir()) == []
