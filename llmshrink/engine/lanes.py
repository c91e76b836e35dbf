"""Batches side by side: two threads with half of the cores each finish sooner than one after another with all cores.

Most operations of a block are short, and short operations gain little from more threads: they wait for each other at
the end of every one. Two batches at a time keep the cores busy. Measured on two cores: a block 256 wide takes 0.73 of
the time, one 1536 wide 0.88 (dev/LOG.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

LANES = 2
T = TypeVar("T")


def lanes_of(device: torch.device) -> int:
    """How many batches run at a time: one on a GPU, which one batch fills."""
    return min(LANES, torch.get_num_threads()) if device.type == "cpu" else 1


def side_by_side(device: torch.device, job: Callable[[int], T], count: int) -> Iterator[T]:
    """Results of `job(0)` to `job(count - 1)`, in this order, begun in this order, without gradients.

    An error of a job is raised here, once those that run beside it have ended. What a job computes does not depend on
    the jobs beside it, nor on which thread it gets: all have the same number of cores.
    """
    lanes, total = lanes_of(device), torch.get_num_threads()
    if lanes == 1:
        with torch.no_grad():
            yield from map(job, range(count))
        return

    def begin() -> None:  # torch holds both settings for each thread
        torch.set_num_threads(total // lanes)
        torch.set_grad_enabled(False)

    with ThreadPoolExecutor(lanes, initializer=begin) as pool:
        results = pool.map(job, range(count))
        try:
            yield from results
        finally:
            results.close()  # type: ignore[attr-defined] # jobs not begun yet are dropped
            torch.set_num_threads(total)  # what threads that begin later start from


class Turns:
    """Lets jobs that run side by side add to a sum in the order of their numbers, so that it always rounds alike.

    Attributes:
        count: Jobs 0 to count - 1 take part; each is `over` at its end, whether or not it had its turn at every sum.
    """

    def __init__(self, count: int) -> None:
        self._changed = threading.Condition()
        self._added: dict[int, set[Hashable]] = {job: set() for job in range(count)}

    @contextmanager
    def turn(self, job: int, key: Hashable) -> Iterator[None]:
        """Wait until every earlier job has added to the sum `key`, or is over."""
        with self._changed:
            self._changed.wait_for(lambda: all(key in added for n, added in self._added.items() if n < job))
        yield
        with self._changed:
            self._added[job].add(key)
            self._changed.notify_all()

    @contextmanager
    def taking_part(self, job: int) -> Iterator[None]:
        """The time of a job, from beginning to end, failed or not."""
        try:
            yield
        finally:
            with self._changed:
                del self._added[job]
                self._changed.notify_all()
