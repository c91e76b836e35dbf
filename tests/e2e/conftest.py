"""A model that is quantized in a second, and runs without the reader that imports for several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_case import Case, make_case
from crash_server import CrashServer
from tiny import build_model, config

from llmshrink import run
from llmshrink.report.schema import Check


@pytest.fixture(scope="session")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the smallest Llama; tests spoil only copies of it."""
    folder = tmp_path_factory.mktemp("smallest") / "model"
    build_model(
        folder, config("llama", hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)
    )
    return folder


@pytest.fixture(scope="module")
def without_reader() -> Iterator[None]:
    """Leave out the check that loads the output with plain transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
        yield


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
