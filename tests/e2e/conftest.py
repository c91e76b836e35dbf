"""Runs that are killed, and what an unbroken one gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_case import Case, make_case
from crash_server import CrashServer


@pytest.fixture(scope="session")
def server() -> Iterator[CrashServer]:
    """Runs recipes in processes that may be killed."""
    with CrashServer() as found:
        yield found


@pytest.fixture(scope="session")
def cases(
    server: CrashServer, smallest: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    """A function name of `CASES` -> case, each made once."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = make_case(server, name, smallest, text_file, tmp_path_factory.mktemp(name))
        return made[name]

    return case
