"""Signals: the first ends a run after its block, a second at once; either way nothing that is finished is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from crash_case import Case
from crash_server import Ended
from helpers import SMALL, SMALL_METHOD, assert_complete, content, recipe

from llmshrink import run
from llmshrink.progress import Silent
from llmshrink.recipe.load import dump
from llmshrink.recipe.schema import Recipe

STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def told(ended: Ended) -> None:
    words = "Stopped by SIG" in ended.message and "same command" in ended.message
    assert words if ended.code == 12 else ended.code in (130, -signal.SIGTERM), ended


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_at_any_moment(cases: Callable[[str], Case], number: signal.Signals) -> None:
    case = cases("gptq-dense")
    case.survives(12, check=told, signals=[[case.seconds * (0.2 + 0.2 * STOPS.index(number)), number]])


def stop_twice(case: Case, times: int) -> None:
    pick = random.Random(3)
    for _ in range(times):
        first = case.seconds * pick.uniform(0.1, 1.0)
        second = first + case.seconds * pick.uniform(0.0, 0.1)
        # A second signal may come when the run is over and its handlers are gone.
        both = [[first, signal.SIGINT], [second, signal.SIGTERM]]
        case.survives(12, 130, -signal.SIGTERM, check=told, signals=both)


def test_a_second_signal_stops_at_once(cases: Callable[[str], Case]) -> None:
    stop_twice(cases("gptq-dense"), 2)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["gptq-dense", "nf4-bnb", "export"])
def test_two_signals_at_any_moment(cases: Callable[[str], Case], name: str) -> None:
    stop_twice(cases(name), 30)


# --- the command line


@pytest.fixture
def command(smallest: Path, text_file: Path, tmp_path: Path) -> tuple[Recipe, list[str]]:
    """A recipe, and the command that carries it out."""
    wanted = recipe(smallest, tmp_path / "out", text_file, SMALL_METHOD, **SMALL)
    (tmp_path / "recipe.yaml").write_text(dump(wanted))
    return wanted, [sys.executable, "-m", "llmshrink", "quantize", "-v", "-r", str(tmp_path / "recipe.yaml")]


def when(line: str, stream: IO[str]) -> None:
    """Read up to a line that holds some words."""
    assert any(line in found for found in stream), f"no line with {line!r}"


def signalled(command: list[str], line: str, *numbers: signal.Signals, wait: float = 0.0) -> tuple[int, str]:
    """Send signals to a run and all its processes, as schedulers and terminals do, once it tells of something."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr
        when(line, process.stderr)
        time.sleep(wait)
        for number in numbers:
            os.killpg(process.pid, number)
            time.sleep(0.05)
        return process.wait(60), process.stderr.read()


def goes_on(wanted: Recipe, tmp_path: Path, without_reader: Any) -> None:
    """The rest of a run, and an unbroken run of the same recipe."""
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    run.execute(wanted, progress=Silent())
    assert_complete(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "recipe.yaml"}
    unbroken = wanted.model_copy(update={"output": str(tmp_path / "unbroken")})
    run.execute(unbroken, progress=Silent())
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_the_command_line_ends_with_12(command: tuple[Recipe, list[str]], tmp_path: Path, without_reader: None) -> None:
    code, said = signalled(command[1], "block 0", signal.SIGTERM)
    assert code == 12, said
    assert "llmshrink: Stopped by SIGTERM." in said
    goes_on(command[0], tmp_path, without_reader)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("line", "numbers", "wait", "code"),
    [
        ("block 0", [signal.SIGUSR1], 0.0, 12),
        ("block 0", [signal.SIGINT, signal.SIGINT], 0.0, 12),
        ("compress: done", [signal.SIGTERM], 0.5, 12),  # the reader's processes get it too
        ("compress: done", [signal.SIGUSR1], 3.0, 12),
        ("compress: done", [signal.SIGINT, signal.SIGINT], 2.0, 130),
        ("block 0", [signal.SIGHUP], 0.0, -signal.SIGHUP),  # not handled: the terminal is gone, and all is on disk
    ],
)
def test_more_signals_to_the_command_line(
    command: tuple[Recipe, list[str]],
    tmp_path: Path,
    without_reader: None,
    line: str,
    numbers: list[signal.Signals],
    wait: float,
    code: int,
) -> None:
    found, said = signalled(command[1], line, *numbers, wait=wait)
    assert found in {code, 130} if len(numbers) > 1 else found == code, said
    goes_on(command[0], tmp_path, without_reader)
