"""How the library tells what it is doing, without knowing about terminals: the command line gives the real one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llmshrink.forms import Event


class Progress(Protocol):
    """A listener to the steps of a run."""

    def start(self, step: str, total: int) -> None:
        """A step begins; `total` is its work in parameters (compress) or tokens (evaluate), 0 if unknown."""

    def advance(self, amount: int, note: str = "") -> None:
        """Some of the step's work is done; `note` says what, e.g. the block's name and error."""

    def finish(self) -> None:
        """The step is over."""

    def event(self, event: Event) -> None:
        """Something degraded or is worth knowing."""


class Silent:
    """A listener that does nothing."""

    def start(self, step: str, total: int) -> None:
        """Ignore."""

    def advance(self, amount: int, note: str = "") -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""

    def event(self, event: Event) -> None:
        """Ignore."""
