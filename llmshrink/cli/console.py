"""Where output goes: data on stdout, everything else on stderr; errors as one message with a stable exit code.

What is told may quote names from strangers and secrets of the user: the former are made visible (no terminal escapes),
the latter are hidden in whatever passes through the two streams.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO, cast

from llmshrink.redact import redact, redact_data

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 120  # of tables in files and pipes, where no terminal says


class _Redacted:
    """A text stream without secrets; everything but writing is that of the stream behind it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def redacted_streams() -> Iterator[None]:
    """Hide secrets in everything that is written to stdout and stderr."""
    out, err = (cast(TextIO, _Redacted(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


def visible(text: str) -> str:
    r"""Text whose control characters, and marks that reorder it, are written out: `\x1b`. Line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def show(table: RenderableType) -> None:
    """A table on stdout; in a file or pipe without the blanks that fill its lines."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(table)
        return
    console = Console(width=WIDTH)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def show_json(data: Any) -> None:
    """JSON on stdout."""
    print(json.dumps(redact_data(data), indent=2))


def say(message: str) -> None:
    """A line on stderr."""
    print(visible(message), file=sys.stderr)


def report_error(error: BaseException, code: int, message: str, *, as_json: bool, verbose: bool) -> None:
    """Tell an error on stderr: a traceback with `verbose`, the message, and with `as_json` one line of JSON at the end.

    The JSON object has `code` (the exit code), `error` (the class), `message`, and `problems` where there are several.
    """
    if verbose:
        say("".join(traceback.format_exception(error)).rstrip())
    say(f"llmshrink: {message}")
    if as_json:
        problems = getattr(error, "problems", None)
        told = {"code": code, "error": type(error).__name__, "message": message}
        say(json.dumps(redact_data(told | ({"problems": problems} if problems else {}))))
