"""Where output goes: data on stdout, everything else on stderr; errors as one message with a stable exit code."""

from __future__ import annotations

import json
import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 120  # of tables in files and pipes, where no terminal says


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
    print(json.dumps(data, indent=2, ensure_ascii=False))


def say(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr)


def report_error(error: BaseException, code: int, message: str, *, as_json: bool, verbose: bool) -> None:
    """Tell an error on stderr: a traceback with `verbose`, the message, and with `as_json` one line of JSON at the end.

    The JSON object has `code` (the exit code), `error` (the class), `message`, and `problems` where there are several.
    """
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    say(f"llmshrink: {message}")
    if as_json:
        problems = getattr(error, "problems", None)
        say(
            json.dumps(
                {"code": code, "error": type(error).__name__, "message": message}
                | ({"problems": problems} if problems else {}),
                ensure_ascii=False,
            )
        )
