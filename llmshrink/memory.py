"""Memory of this process: what it holds, its peak, what is free, and how freed tensors go back to the system.

Anonymous memory (`RssAnon`) is what a run really needs: pages of a memory-mapped checkpoint are not in it, because the
system can drop them at any time. `ru_maxrss` counts them, and never falls.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Self

import psutil
import torch

TRIM = 32 * 2**20  # bytes free at the top of the heap that go back by themselves; `trim` gives the rest
THRESHOLD = 4 * 2**20  # bytes; larger tensors are mapped on their own. See `fix_malloc` for why these sizes
WORTH_TRIMMING = 32 * 2**20  # bytes: pages given back cost a fault each when they are needed again
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "can't start new thread")
PERIOD = 0.01  # seconds between two samples
CHILDREN_EVERY = 100  # samples between two looks for new children: finding them reads all of /proc


def anonymous_bytes(processes: list[psutil.Process] | None = None) -> int:
    """Anonymous resident memory, bytes; all resident memory where the system does not tell them apart.

    Args:
        processes: Those to add up; None means this one and its children, found anew (milliseconds).
    """
    return sum(_anonymous(process) for process in processes or _family())


def resident_bytes(processes: list[psutil.Process] | None = None) -> int:
    """Like `anonymous_bytes`, but with the pages of mapped files: a checkpoint read through a map counts here."""
    return sum(_resident(process) for process in processes or _family())


def _family() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended
        return 0


def _anonymous(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_bytes()
    except OSError:
        return _resident(process)
    found = status.find(b"RssAnon:")
    return _resident(process) if found < 0 else int(status[found : found + 40].split()[1]) * 1024


class PeakMonitor:
    """Samples the memory of this process and its children from a thread: `with PeakMonitor() as memory: ...`.

    Attributes:
        base_bytes: The level that counts as zero: as given, or when the block was entered.
        peak_bytes: The highest level seen so far, at least that one.
        device_bytes: Peak allocated by torch on the accelerator since entry; None without one. Set on leaving.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        probe: Callable[[list[psutil.Process] | None], int] = anonymous_bytes,
        base: int | None = None,
    ) -> None:
        self.base_bytes = 0
        self._base = base
        self.peak_bytes = 0
        self.device_bytes: int | None = None
        self._device = device if device is not None and device.type == "cuda" else None
        self._probe = probe
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def above_base_bytes(self) -> int:
        """What the block needed at its peak, on top of the level that counts as zero."""
        return self.peak_bytes - self.base_bytes

    def __enter__(self) -> Self:
        self.base_bytes = self.peak_bytes = self._probe(None) if self._base is None else self._base
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._device is not None:
            self.device_bytes = torch.cuda.max_memory_allocated(self._device)

    def _watch(self) -> None:
        sample = 0
        stopped = False
        while not stopped:
            stopped = self._stop.wait(PERIOD)  # one more sample after the last statement of the block
            if sample % CHILDREN_EVERY == 0:
                family = _family()
            sample += 1
            self.peak_bytes = max(self.peak_bytes, self._probe(family))


_most: ContextVar[int | None] = ContextVar("most", default=None)


@contextmanager
def memory_limit(most: int | None) -> Iterator[None]:
    """Let `available_memory` count no further than to `most` bytes in this process and its children; None: no limit."""
    token = _most.set(most)
    try:
        yield
    finally:
        _most.reset(token)


def available_memory() -> int:
    """Bytes this process can still take: what is free, or what `memory_limit` leaves."""
    most = _most.get()
    return free_memory() if most is None else min(free_memory(), max(0, most - anonymous_bytes()))


def free_memory() -> int:
    """Bytes this process can still take: the system's, or what its control group leaves where that is less."""
    return min([int(psutil.virtual_memory().available), *_group_headroom(Path("/"))])


def memory_error(error: BaseException | None) -> BaseException | None:
    """The failed allocation that an error is or was caused by, or None."""
    while error is not None:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if known or any(words in str(error) for words in NO_MEMORY):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def release(device: torch.device) -> None:
    """Give back all memory that is held without need."""
    if device.type == "cuda":
        gc.collect()  # an error that was caught may hold tensors in a cycle
        torch.cuda.empty_cache()
    trim()


def _group_headroom(root: Path) -> list[int]:
    """Limit minus use of each control group above this process (v1 and v2). File cache in use can be reclaimed."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    headroom = []
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit, use, cache = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        folder = top / path.lstrip("/")
        for group in [folder, *folder.parents]:
            if group.is_relative_to(top) and (left := _left(group, limit, use, cache)) is not None:
                headroom.append(left)
    return headroom


def _left(group: Path, limit: str, use: str, cache: str) -> int | None:
    """Bytes left in one control group, or None where it sets no limit or is not to be seen from here."""
    try:
        most = int((group / limit).read_text())  # v2 writes "max" for none
        used = int((group / use).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    reclaimable = next((int(line.split()[1]) for line in lines if line.split()[0] == cache), 0)
    return max(0, most - used + reclaimable)


def fix_malloc() -> None:
    """Make glibc give freed big tensors back at once; does nothing with another C library.

    By default glibc raises its thresholds up to 32 and 64 MiB as big blocks are freed, and then keeps what later
    blocks free. Fixed thresholds stop that. A mapped tensor costs page faults each time it is made (on a 2.5 GHz Xeon
    doubling one of 4 MB took 2.7 ms in place of 0.5), and a heap full of tensors of all sizes gets holes: with 16 MiB
    in place of 4 it grew by 100 MiB in 24 blocks, while activations small enough for the cache are below 4. A heap
    that shrinks by itself at 4 MiB costs faults too: 15 % of the compress step of a small model. Threads share one
    heap: with one for each, two threads took 30 to 55 MiB more, and were not faster.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
        libc.mallopt(m_mmap_threshold, THRESHOLD)
        libc.mallopt(m_trim_threshold, TRIM)
        libc.mallopt(m_arena_max, 1)


def trim() -> None:
    """Give the free pages of the heap back to the system where they are many. Does nothing without glibc."""
    libc = _libc()
    if libc is None or not hasattr(libc, "malloc_trim"):
        return
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = _HeapInfo
        if libc.mallinfo2().free < WORTH_TRIMMING:
            return
    libc.malloc_trim(0)


class _HeapInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h: ten numbers, of which the ninth counts the free bytes of the heap."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in [*(f"_{i}" for i in range(8)), "free", "_9"])


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


__all__ = [
    "PeakMonitor",
    "anonymous_bytes",
    "available_memory",
    "fix_malloc",
    "free_memory",
    "memory_limit",
    "memory_error",
    "release",
    "resident_bytes",
    "trim",
]
