"""How the library tells what it is doing, without knowing about terminals: the command line gives the real one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llmshrink.forms import Event


class Progress(Protocol):
    """A listener to the steps of a run."""

    def start(self, step: str, total: int, done: int = 0) -> None:
        """A step begins; `total` is its work in parameters (compress) or tokens (evaluate), 0 if unknown.

        `done` of it was done by an earlier run.
        """

    def advance(self, amount: int, note: str = "") -> None:
        """Some of the step's work is done; `note` says what, e.g. the block's name and error."""

    def finish(self) -> None:
        """The step is over."""

    def event(self, event: Event) -> None:
        """Something degraded or is worth knowing."""


class Silent:
    """A listener that does nothing."""

    def start(self, step: str, total: int, done: int = 0) -> None:
        """Ignore."""

    def advance(self, amount: int, note: str = "") -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""

    def event(self, event: Event) -> None:
        """Ignore."""


def seconds(value: float) -> str:
    """A duration in words."""
    if value < 60:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
