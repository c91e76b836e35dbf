"""Bytes as people write them."""

import pytest

from llmshrink.errors import RecipeError
from llmshrink.recipe import load


def within(memory):
    return load.validate({"version": 1, "stages": [{"task": "eval"}], "run": {"memory": memory}})


@pytest.mark.parametrize(
    ("written", "meant"), [("6GiB", 6 << 30), (" 500 MB ", 500_000_000), ("1024", 1024), (7, 7), (None, None)]
)
def test_sizes_are_held_as_bytes_and_come_back(written, meant):
    recipe = within(written)
    assert recipe.run.memory == meant
    assert load.validate(load.text.parse(load.dump(recipe), "dump")) == recipe


@pytest.mark.parametrize("written", ["30%", "6 GiBs", "-1", 0, -5, 1.5, True, "", "much", "9" * 30])
def test_what_is_no_size_is_refused(written):
    """Also a share: pydantic alone would read 30% as 30 bytes."""
    with pytest.raises(RecipeError, match=r"run\.memory"):
        within(written)
