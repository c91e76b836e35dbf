"""The disk refuses, once or for good: the run says what and where, keeps what is finished, and goes on later."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_case import CASES, Case
from crash_server import Ended
from helpers import assert_complete, content
from injected import DISK, ERRNOS

SAMPLED = 2  # calls of each kind


def told(error: str) -> Callable[[Ended], None]:
    """The check that a message names a file, and the exit code says whether room is what is missing."""

    def check(ended: Ended) -> None:
        unread = ended.code == 8  # what was written cannot be read back
        assert unread or ended.code == (6 if error == "ENOSPC" else 7), ended
        assert re.search(r"/\d+(/|:)", ended.message), ended  # something in the folder of this case, or the folder
        if ended.code == 6:
            assert "MiB for" in ended.message and "Make room" in ended.message

    return check


def fail(case: Case, kind: str, at: int, error: str, sticky: bool) -> None:
    disk = {"kind": kind, "at": at, "error": error, "sticky": sticky}
    case.survives(6, 7, 8, check=told(error), disk=disk)


@pytest.mark.parametrize("kind", DISK)
def test_a_call_that_fails_costs_no_finished_work(cases: Callable[[str], Case], kind: str) -> None:
    case, pick = cases("gptq-compressed-tensors"), random.Random(kind)
    for at in pick.sample(range(1, case.unbroken.counts[kind] + 1), min(SAMPLED, case.unbroken.counts[kind])):
        fail(case, kind, at, pick.choice(ERRNOS), pick.random() < 0.5)


@pytest.mark.faults
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize("kind", DISK)
@pytest.mark.parametrize("name", ["gptq-dense", "export"])
def test_every_call_may_fail(cases: Callable[[str], Case], name: str, kind: str, sticky: bool) -> None:
    case = cases(name)
    for at in range(1, case.unbroken.counts[kind] + 1):
        fail(case, kind, at, ERRNOS[at % len(ERRNOS)], sticky)


# --- no room


def blocks_told(ended: Ended) -> None:
    assert re.search(r"/out.*: File too large\. The run needs 0\.\d MiB for .*/out, and", ended.message), ended


@pytest.mark.parametrize("size", [2_000, 20_000])
def test_a_file_that_may_not_grow_ends_the_run_with_6(cases: Callable[[str], Case], size: int) -> None:
    """The limit cuts a journal line or a shard short."""
    ended = cases("gptq-dense").survives(6, check=blocks_told, limits=[["RLIMIT_FSIZE", size]])
    assert ended.code == 6


@pytest.mark.faults
@pytest.mark.parametrize("name", CASES)
def test_files_of_every_largest_size(cases: Callable[[str], Case], name: str) -> None:
    for size in range(0, 60_000, 1_000):
        cases(name).survives(6, limits=[["RLIMIT_FSIZE", size]])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_with_6_and_room_lets_it_go_on(cases: Callable[[str], Case], small_disk: Path) -> None:
    case, out, filler = cases("gptq-dense"), small_disk / "out", small_disk / "filler"
    codes = []
    for pages in range(60, -1, -4):  # less and less is in the way
        filler.write_bytes(bytes(4096 * pages))
        refused = case.run(out)
        codes.append(refused.code)
        if refused.code == 0:
            break
        assert refused.code == 6 and str(out) in refused.message, refused
        assert not out.exists()
    assert codes[-1] == 0 and len(codes) > 4, (codes, refused)
    assert_complete(out)
    assert content(out) == case.expected


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written to, not even by root where that can be had."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("root may write anywhere, and cannot mount here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_to_is_told_before_any_compute(
    cases: Callable[[str], Case], read_only: Path
) -> None:
    case = cases("gptq-dense")
    refused = case.run(read_only / "out", memory={})
    assert refused.code == 7 and str(read_only) in refused.message
    assert refused.seconds < 2
    assert refused.counts["operations"] < case.unbroken.counts["operations"] / 2


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_every_file_has_the_mode_that_the_umask_asks_for(cases: Callable[[str], Case], umask: int, mode: int) -> None:
    case = cases("gptq-compressed-tensors")
    out = case.new_folder() / "out"
    assert case.run(out, umask=umask).code == 0
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {mode}
    assert out.stat().st_mode & 0o777 == mode | 0o111 & ~umask
    case.finishes(out, "umask")
