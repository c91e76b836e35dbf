"""What every attack must come to: a short answer, an exit code, nothing left beside, nothing touched."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

SECONDS = 30  # no attack may hold the program longer
BYTES = 1 << 30  # nor may it take more memory

Refused = Callable[..., tuple[int, str, set[str]]]
Attack = Callable[..., str]


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """An attack that hangs, or fills the memory, fails its test."""

    def end(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"held for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < BYTES


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that no attack may change, in a folder to which none may add."""
    path = tmp_path_factory.mktemp("foreign") / "canary"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious" and list(path.parent.iterdir()) == [path]


@pytest.fixture
def attack(refused: Refused, without_reader: None) -> Attack:
    """Run `llmshrink quantize` on arguments and check how it ends; gives what was said."""

    def call(code: int, *arguments: str | Path) -> str:
        found, said, left = refused(*arguments)
        assert (found, left) == (code, set()), said
        assert "Traceback" not in said and "internal error" not in said
        assert said.isascii() or said.replace("\n", "").isprintable()
        assert not any(c in said for c in "\x1b\x07\x00") and len(said) < 3000
        return said

    return call


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
