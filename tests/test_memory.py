"""What the monitor sees, and what a control group leaves."""

import ctypes
import multiprocessing
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from llmshrink import memory
from llmshrink.memory import (
    PeakMonitor,
    anonymous_bytes,
    available_memory,
    fix_malloc,
    free_memory,
    memory_limit,
    resident_bytes,
    trim,
)

MB = 10**6
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and glibc")


def test_monitor_sees_an_allocation_that_is_gone_again() -> None:
    with PeakMonitor(torch.device("cpu")) as monitor:
        block = torch.ones(25 * MB)
        time.sleep(0.05)
        del block
    assert 95 * MB < monitor.above_base_bytes < 150 * MB
    assert monitor.device_bytes is None


def test_monitor_sees_nothing_where_nothing_is_allocated() -> None:
    with PeakMonitor() as monitor:
        time.sleep(0.05)
    assert 0 <= monitor.above_base_bytes < 20 * MB


def hold(ready: Event, done: Event) -> None:
    block = b"x" * (80 * MB)
    ready.set()
    done.wait(30)
    del block


@linux
def test_children_count() -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    before = anonymous_bytes()
    child = context.Process(target=hold, args=(ready, done))
    child.start()
    assert ready.wait(60)
    held = anonymous_bytes() - before
    done.set()
    child.join()
    assert held > 75 * MB


@linux
def test_mapped_files_are_resident_but_not_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * (40 * MB))
    anonymous, resident = anonymous_bytes(), resident_bytes()
    mapped = torch.from_file(str(path), shared=False, size=40 * MB, dtype=torch.uint8)
    assert int(mapped.sum()) == 40 * MB
    assert resident_bytes() - resident > 35 * MB
    assert anonymous_bytes() - anonymous < 15 * MB


@linux
def test_freed_tensors_go_back_to_the_system() -> None:
    fix_malloc()
    trim()  # pages that earlier tests left free would be used again
    before = anonymous_bytes()
    blocks = [torch.ones(250_000) for _ in range(100)]  # 1 MB each, below the threshold: they live in the heap
    assert anonymous_bytes() - before > 90 * MB
    kept = blocks[9::10]  # between the freed ones, so that they are not simply at the top
    del blocks
    trim()
    assert anonymous_bytes() - before < 30 * MB
    assert len(kept) == 10


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ctypes.CDLL):
        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

    for libc in (None, Other(None)):
        monkeypatch.setattr(memory, "_libc", lambda libc=libc: libc)
        fix_malloc()
        trim()


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_available_memory_heeds_control_groups(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    lines = tmp_path / "proc/self/cgroup"
    stat = "anon 700\ninactive_file 200\ntotal_inactive_file 50\n"
    v2, v1 = tmp_path / "sys/fs/cgroup", tmp_path / "sys/fs/cgroup/memory"
    group(v2 / "a", {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": stat})
    group(v2 / "a/b", {"memory.max": "max\n", "memory.current": "10\n", "memory.stat": stat})
    group(v1, {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "4000", "memory.stat": stat})
    lines.write_text("0::/a/b\n")
    assert memory._group_headroom(tmp_path) == [300]  # the parent's limit binds; cache can be reclaimed
    lines.write_text("5:cpu:/x\n4:memory:/docker/of/the/host\n")
    assert memory._group_headroom(tmp_path) == [1050]
    assert memory._group_headroom(tmp_path / "nowhere") == []
    assert available_memory() > 0


def test_a_limit_counts_what_is_held_already() -> None:
    free = free_memory()
    with memory_limit(anonymous_bytes() + 50 * MB):
        assert 30 * MB < available_memory() <= 60 * MB
        with memory_limit(1):
            assert available_memory() == 0
    with memory_limit(None):
        assert available_memory() == pytest.approx(free, rel=0.1)
