"""Regular expressions from strangers, over layer names: in a recipe, or in the settings of a model.

An engine that backtracks, as Python's own does, can need 2^n steps for a name of n characters. `regex` is another such
engine, but one that gives up after a time.
"""

from __future__ import annotations

import regex

from llmshrink.errors import UnsafeError

SECONDS = 1.0  # of CPU time for one name; microseconds are usual


def fault(pattern: str) -> str | None:
    """Why a pattern is not a regular expression, or None."""
    try:
        regex.compile(pattern)
    except (regex.error, OverflowError) as error:
        return str(error)
    except RecursionError:
        return "nested too deep"
    return None


def matches(pattern: str, name: str, *, whole: bool = True) -> bool:
    """Whether a pattern matches a name: all of it, or its beginning.

    Raises:
        UnsafeError: the search takes so long that it may never end.
        ValueError: it is not a regular expression.
    """
    search = regex.fullmatch if whole else regex.match
    try:
        return search(pattern, name, timeout=SECONDS) is not None
    except regex.error as error:
        raise ValueError(f"{pattern[:100]!r} is not a regular expression: {error}") from error
    except TimeoutError:
        raise UnsafeError(
            f"The expression {pattern[:100]!r} takes longer than {SECONDS:g} s on the name {name[:100]!r}.",
            hint="It backtracks without end, by mistake or on purpose: write it without one repetition in another.",
        ) from None
