"""In a control group with little memory, as in a container: refused beforehand, or kept within it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path("/sys/fs/cgroup")


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """The file that takes the processes of a new group with a limit of memory (version 1 or 2)."""
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in groups:
        if controllers in ("", "memory"):
            folder = ROOT / controllers / path.lstrip("/") / f"llmshrink-{os.getpid()}"
            limits = folder / ("memory.limit_in_bytes" if controllers else "memory.max")
            try:
                folder.mkdir()
            except OSError:
                continue
            try:
                limits.write_text(str(limit))
                yield folder / "cgroup.procs"
                return
            except OSError:
                continue
            finally:
                while (folder / "cgroup.procs").read_text():  # a reader's helpers end a moment later
                    time.sleep(0.1)
                folder.rmdir()
    pytest.skip("no control group can be made here")


@pytest.fixture
def confined(smallest: Path, text_file: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Quantize in a group of a limit; the output is `tmp_path / "out"`."""

    def call(limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        settings = ["--output", tmp_path / "out", "--calibration", text_file, "--group-size", "32"]
        more = ["--samples", "4", "--length", "64", "--set", "evaluation.data=[]", "--set", "evaluation.speed=false"]
        command = [sys.executable, "-m", "llmshrink", "quantize", smallest, *settings, *more, *arguments]
        with control_group(limit) as procs:
            return subprocess.run(
                [str(part) for part in command],
                preexec_fn=lambda: procs.write_text(str(os.getpid())),
                capture_output=True,
                text=True,
            )

    return call


def test_what_does_not_fit_into_the_group_is_refused_before_the_system_kills_it(
    confined: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    ended = confined(1 << 30, "--samples", "4096", "--set", "run.batch_tokens=1000000")
    assert ended.returncode == 6 and "of memory are needed to compress" in ended.stderr
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_fits_is_not_refused(
    confined: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    ended = confined(1 << 30)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out").exists()
