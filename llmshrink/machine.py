"""The machine a run works on: device, threads, versions, signals, and libraries kept quiet."""

from __future__ import annotations

import logging
import math
import os
import platform
import signal
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

import torch

from llmshrink import __version__, ranks
from llmshrink.errors import InterruptedRun, ResourceError, UsageError
from llmshrink.forms import Event
from llmshrink.memory import memory_error
from llmshrink.progress import Progress

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # schedulers send the last some time before they kill
ECHO = 2.0  # seconds in which launchers pass on what was sent to all processes of a job
PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "bitsandbytes", "tokenizers", "numpy")


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` takes a GPU where there is one.

    Raises:
        UsageError: no such device on this machine.
    """
    own = ranks.local()  # the GPU of this process
    if name == "auto":
        return torch.device("cuda", own) if torch.cuda.is_available() and not ranks.on_cpu() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"There is no device {name!r}.", hint="Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"Device {name!r} is not supported.", hint="Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"This machine has no device {name!r}.", hint="Use --device cpu.")
    if device.type == "cuda" and ranks.launched():
        if device.index is not None and ranks.count() > 1:
            raise UsageError(f"Several processes cannot share {name!r}.", hint="Use auto: each takes its own.")
        return torch.device("cuda", own)
    return device


def device_name(device: torch.device) -> str:
    """The device with the model of its GPU: another one gives other bytes."""
    return str(device) if device.type != "cuda" else f"{device} ({torch.cuda.get_device_name(device)})"


def versions() -> dict[str, str]:
    """Versions that decide the bytes of a result."""
    found = {"llmshrink": __version__, "python": platform.python_version(), "zlib": zlib.ZLIB_RUNTIME_VERSION}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """What a bug report needs to know."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **versions(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": ", ".join(gpus) or "none",
    }


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Transformers and bitsandbytes say nothing below an error, and draw no bars: this program speaks for them."""
    from transformers.utils import logging as transformers_logging

    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    other = logging.getLogger("bitsandbytes")  # it misses kernels of the Hub that nothing here asks for
    level = other.level
    other.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # of peft: it asks transformers by an older name, and AdaLoRA by a wrong one
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
            warnings.filterwarnings("ignore", "Adapter .* have invalid shape")  # a linear that AdaLoRA leaves no rank
            yield
    finally:
        other.setLevel(level)
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Set torch's threads for a run: products come out with other bytes when their number changes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn an allocation that failed, on the host or on a GPU, into an error that says so.

    Raises:
        ResourceError: memory ran out.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - libraries wrap it, and so do our own errors that name a file
        first = memory_error(error)
        if first is None or isinstance(error, ResourceError):
            raise
        raise ResourceError(
            f"Memory ran out: {str(first).splitlines()[0] if str(first) else 'an allocation failed'}",
            hint="What is finished is kept: give the same command again with --memory SIZE, or with smaller batches "
            "(--set run.batch_tokens=N).",
        ) from error


class StopSignal:
    """SIGINT, SIGTERM and SIGUSR1: the first asks to stop at the next block, a second stops at once with code 130.

    A run that cannot be resumed is stopped by the first. A signal that the process was started to ignore stays ignored.
    """

    def __init__(self, *, resumable: bool) -> None:
        self._resumable = resumable
        self._caught: str | None = None
        self._when = -math.inf  # seconds, by the clock
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        try:
            for number in STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: whoever owns the process handles its signals
            self._previous.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if ranks.launched() and time.monotonic() - self._when < ECHO:
            return
        if self._caught is not None or not self._resumable:
            raise KeyboardInterrupt
        self._caught, self._when = signal.Signals(number).name, time.monotonic()
        if ranks.first():
            told = f"\n{self._caught}: stopping after this block; again to stop at once\n"
            os.write(2, told.encode())  # what a handler may call

    def over(self, progress: Progress) -> Progress:
        """The same listener, which also looks for a signal whenever it is told of progress."""
        return _Watched(progress, self.check)

    def check(self) -> None:
        """Raise InterruptedRun if a signal came."""
        if self._caught is not None:
            raise InterruptedRun(f"Stopped by {self._caught}.", hint="The same command goes on from what was finished.")


class _Watched:
    """A listener that calls `check` before it passes on what it hears."""

    def __init__(self, progress: Progress, check: Callable[[], None]) -> None:
        self._progress, self._check = progress, check

    def start(self, step: str, total: int, done: int = 0) -> None:
        self._check()
        self._progress.start(step, total, done)

    def advance(self, amount: int, note: str = "") -> None:
        self._progress.advance(amount, note)
        self._check()

    def finish(self) -> None:
        self._progress.finish()
        self._check()

    def event(self, event: Event) -> None:
        self._progress.event(event)
