"""What a run shows on stderr: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from llmshrink.cli.console import visible
from llmshrink.progress import Progress, Silent, seconds

if TYPE_CHECKING:
    from rich.console import Console

    from llmshrink.forms import Event

EVERY = 5.0  # seconds between two plain lines of one step
TOLD = 3  # events of one kind that are shown as they come; the report lists all


@dataclass
class _Step:
    name: str
    total: int
    begun: float  # seconds, by the clock
    told: float
    before: int  # done by an earlier run
    done: int = 0  # since


class _Events:
    """Shows the first events of each kind and counts the others."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._seen: Counter[str] = Counter()

    def tell(self, event: Event) -> None:
        self._seen[event.kind] += 1
        if self._seen[event.kind] <= TOLD:
            where = f"{event.layer}: " if event.layer else ""
            self._write(f"note: {where}{event.message}")

    def close(self) -> None:
        for kind, count in self._seen.items():
            if count > TOLD:
                self._write(f"note: {count - TOLD} more of the kind '{kind}'; the report lists them")


class Lines:
    """A listener for logs: one line when a step ends and now and then in between."""

    def __init__(self, stream: TextIO, *, verbose: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._every = 0.0 if verbose else EVERY
        self._clock = clock
        self._steps: list[_Step] = []
        self._events = _Events(self._write)

    def start(self, step: str, total: int, done: int = 0) -> None:
        """Begin a step; the first line comes after a few seconds, or at its end."""
        now = self._clock()
        self._steps.append(_Step(step, total, now, now, done))

    def advance(self, amount: int, note: str = "") -> None:
        """Count the work, and tell it where the last line is old enough."""
        step, now = self._steps[-1], self._clock()
        step.done += amount
        if now - step.told >= self._every:
            step.told = now
            self._write(f"{step.name}{_share(step, now - step.begun)}{f' - {note}' if note else ''}")

    def finish(self) -> None:
        """One line for the whole step."""
        step = self._steps.pop()
        self._write(f"{step.name}: done in {seconds(self._clock() - step.begun)}")

    def event(self, event: Event) -> None:
        """One line, for the first of its kind."""
        self._events.tell(event)

    def close(self) -> None:
        """Say how many events were not shown."""
        self._events.close()

    def _write(self, line: str) -> None:
        print(visible(line), file=self._stream, flush=True)


class Bars:
    """A listener for terminals: a bar for each step, with the time left by the work done."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        from rich import progress

        self._console = console
        self._verbose = verbose
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=console,
            speed_estimate_period=3600,  # a block may take minutes, and speed is work over this window
        )
        self._steps: list[progress.TaskID] = []
        self._events = _Events(self._write)
        self._bars.start()

    def start(self, step: str, total: int, done: int = 0) -> None:
        """A new bar; it pulses where the total is not known."""
        self._steps.append(self._bars.add_task(step, total=total or None, completed=done, note=""))

    def advance(self, amount: int, note: str = "") -> None:
        """Move the bar; with `verbose` every note stays on the screen."""
        self._bars.update(self._steps[-1], advance=amount, note=visible(note))
        if self._verbose and note:
            self._write(note)

    def finish(self) -> None:
        """Fill the bar."""
        bar = self._steps.pop()
        done = self._bars.tasks[self._bars.task_ids.index(bar)].completed
        self._bars.update(bar, total=done or 1, completed=done or 1, note="")

    def event(self, event: Event) -> None:
        """A line above the bars, for the first of its kind."""
        self._events.tell(event)

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self._bars.stop()
        self._events.close()

    def _write(self, line: str) -> None:
        self._console.print(visible(line), markup=False, highlight=False)


def _share(step: _Step, elapsed: float) -> str:
    if not step.total or not step.done:
        return f": {seconds(elapsed)}"
    left = max(step.total - step.before - step.done, 0)
    return f": {1 - left / step.total:.0%}, about {seconds(elapsed * left / step.done)} left"


@contextmanager
def listener(*, quiet: bool = False, verbose: bool = False) -> Iterator[Progress]:
    """The listener that fits stderr: bars on a terminal that can draw, lines elsewhere, nothing with `quiet`."""
    if quiet:
        yield Silent()
        return
    if sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
        from rich.console import Console

        shown: Lines | Bars = Bars(Console(stderr=True), verbose=verbose)  # rich itself honours NO_COLOR
    else:
        shown = Lines(sys.stderr, verbose=verbose)
    try:
        yield shown
    finally:
        shown.close()
