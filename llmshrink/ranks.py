"""The processes that were launched with one command line: which one this is, and what the first tells the others.

`accelerate launch` and torchrun start one process for each device and say in the environment who is who. The first
carries out the whole command; the others only train along: each waits for the first's word, trains when it is told to,
and ends when and as the first does. What is told is JSON, and goes through the store at which torch's process groups
meet (TCPStore): a group itself is only there while something is trained, because libraries load models otherwise in it.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what all launchers give
TRUE = ("1", "true", "yes")  # in the environment
MEETING = timedelta(minutes=10)  # until all processes have begun
POLL = 0.05  # seconds between two looks for a word
FAREWELL = 2.0  # seconds that the first waits for the others to have heard that it ends
T = TypeVar("T")


class Dismissed(Exception):  # noqa: N818 - it is not an error of this process
    """The first process has ended."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the first process ended with code {code}")
        self.code = code


def launched() -> bool:
    """Whether a launcher started this process."""
    return all(name in os.environ for name in NEEDED)


def count() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if launched() else 1


def local() -> int:
    """Which of the devices of this machine is this process's."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def on_cpu() -> bool:
    """Whether the launcher was told to leave GPUs alone."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE


def sharded() -> bool:
    """Whether the launcher was told to shard what is trained (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in TRUE


def first() -> bool:
    """Whether this is the process that carries out the command."""
    return not launched() or os.environ["RANK"] == "0"


def left_alone() -> bool:
    """Whether several processes were asked for and one was started, as `accelerate launch --cpu` does without MPI."""
    return "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and not launched()


def meet() -> None:
    """Come to where words are exchanged; the first, which may have to open that place, does so before all else."""
    # Each process loads whole models: a teacher is not sharded, and would stay empty in all processes but the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    _store()


@cache
def _store() -> Store:
    import torch.distributed as dist

    store, _, _ = next(iter(dist.rendezvous("env://", timeout=MEETING)))  # type: ignore[attr-defined]
    return dist.PrefixStore("llmshrink", store)  # type: ignore[attr-defined]


_words = itertools.count()  # told so far by the first, or heard by another


def tell(word: Any) -> None:
    """Tell the others something that JSON can say."""
    _store().set(f"word{next(_words)}", json.dumps({"word": word}))


def hear() -> Any:
    """Wait for the next word of the first.

    Raises:
        Dismissed: it has ended.
    """
    key = f"word{next(_words)}"
    while not _store().check([key]):
        if (code := ended()) is not None:
            raise Dismissed(code)
        time.sleep(POLL)
    return json.loads(_store().get(key))["word"]


def orders() -> Iterator[Any]:
    """Everything that the first tells this process to do, until it ends.

    Raises:
        Dismissed: it has.
    """
    while True:
        yield hear()


def shared(find: Callable[[], T]) -> T:
    """What the first finds, in all processes."""
    if count() == 1:
        return find()
    if not first():
        found: T = hear()
        return found
    own = find()
    tell(own)
    return own


def dismiss(code: int) -> None:
    """Let the others end as the first does, and wait a moment until they have heard."""
    _store().set("end", str(code))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return  # the store outlives this process
    late = time.monotonic() + FAREWELL
    while _store().add("gone", 0) < count() - 1 and time.monotonic() < late:
        time.sleep(POLL)


def ended(wait: float = 0.0) -> int | None:
    """The exit code of the first; None: it has not ended, after so many seconds."""
    late = time.monotonic() + wait
    while not _store().check(["end"]):
        if time.monotonic() >= late:
            return None
        time.sleep(POLL)
    return int(_store().get("end"))


def leave() -> None:
    """Say that this process has heard that the first ends."""
    _store().add("gone", 1)
