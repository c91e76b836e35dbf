"""The README's table of what loads where is the one in code."""

from __future__ import annotations

from pathlib import Path

from llmshrink.formats import format_names
from llmshrink.formats.runtimes import KINDS, RUNTIMES, entry, markdown, worst

README = Path(__file__).parent.parent.parent / "README.md"


def test_the_readme_shows_the_table_of_the_code() -> None:
    text = README.read_text(encoding="utf-8")
    shown = text.partition("test_runtimes.py -->\n")[2].partition("<!-- /runtimes -->")[0]
    assert shown == markdown()


def test_every_format_family_and_runtime_has_an_entry() -> None:
    for name in format_names():
        for kind in KINDS:
            for runtime in RUNTIMES:
                assert entry(name, kind, runtime).reason


def test_a_model_loads_where_its_weakest_layer_loads() -> None:
    mixed = worst("bnb", {"linear", "experts"}, "transformers", bits={4}, symmetric=True)
    assert mixed.support == "no"
    three = worst("compressed-tensors", {"linear"}, "vllm", bits={4, 3}, symmetric=False)
    assert three.support == "no"
