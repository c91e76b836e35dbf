"""The tests that the documents name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMED = re.compile(r"`([\w/]+\.py)?(?:::(\w+))?`")


@pytest.mark.parametrize("name", ["reliability.md"])
def test_every_test_that_is_named_is_there(name: str) -> None:
    found, path = 0, Path()
    for file, test in NAMED.findall((TESTS.parent / "docs" / name).read_text()):
        if file:
            places = [TESTS / file, TESTS / "attacks" / file, TESTS.parent / file]
            path = next((place for place in places if place.is_file()), TESTS / file)
        if file or test:
            found += 1
            assert path.is_file(), file
            assert not test or f"def {test}(" in path.read_text(), f"{path.name}::{test}"
    assert found > 60
