"""The table of docs/formats.md of what loads where is the one in code, and its rules say what they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmshrink.formats import format_names
from llmshrink.formats.runtimes import (
    FAMILIES,
    FORMATS,
    GGUF_FAMILIES,
    ORDER,
    RUNTIMES,
    TABLE,
    Stored,
    entry,
    markdown,
    usual,
)
from llmshrink.forms import Scheme
from llmshrink.gguf.names import FAMILIES as GGUF_NAMES

PAGE = Path(__file__).parent.parent.parent / "docs" / "formats.md"
W4, W3, W4_ASYM, W3_ASYM = Scheme(4, True, 128), Scheme(3, True, 128), Scheme(4, False, 128), Scheme(3, False, 128)
PACKED = Stored("compressed-tensors", frozenset(["linear"]), frozenset([W4]))
GPTQ = replace(PACKED, format="gptq")
AWQ = replace(PACKED, format="awq")


def test_the_page_shows_the_table_of_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = text.partition("test_runtimes.py -->\n")[2].partition("<!-- /runtimes -->")[0]
    assert shown == markdown()


def test_every_format_has_a_line_for_every_runtime_and_family() -> None:
    assert set(FORMATS) == set(format_names())
    assert set(TABLE) == {(name, runtime) for name in FORMATS for runtime in RUNTIMES}
    for name in FORMATS:
        for family in FAMILIES:
            for runtime in RUNTIMES:
                found = entry(usual(family, name), runtime)
                assert found.reason and found.source and found.support in ORDER


def test_families_are_known_to_transformers() -> None:
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(set(types)) == len(types) and set(types) <= set(CONFIG_MAPPING)


@pytest.mark.parametrize(
    ("stored", "runtime", "support"),
    [
        (PACKED, "transformers", "dense-only"),
        (PACKED, "vllm", "native"),
        (PACKED, "llama.cpp", "no"),
        (replace(PACKED, schemes=frozenset([W4, W3])), "transformers", "dense-only"),
        (replace(PACKED, schemes=frozenset([W4_ASYM])), "transformers", "dense-only"),
        (replace(PACKED, schemes=frozenset([W4_ASYM, W3_ASYM])), "transformers", "no"),
        (replace(PACKED, schemes=frozenset([W4_ASYM])), "vllm", "native"),
        (replace(PACKED, schemes=frozenset([W3_ASYM])), "vllm", "no"),
        (replace(PACKED, kinds=frozenset(["linear", "experts"])), "transformers", "dense-only"),
        (replace(PACKED, kinds=frozenset(["experts"]), schemes=frozenset([W4_ASYM])), "transformers", "no"),
        (replace(PACKED, kinds=frozenset(["experts"]), schemes=frozenset([W4_ASYM])), "vllm", "no"),
        (replace(PACKED, kinds=frozenset(["subclass"])), "transformers", "dense-only"),
        (replace(PACKED, kinds=frozenset(["subclass"]), schemes=frozenset([W4, W3])), "transformers", "no"),
        (replace(PACKED, kinds=frozenset(["conv1d"])), "transformers", "no"),
        (replace(PACKED, fused_alike=False), "vllm", "no"),
        (replace(PACKED, head=True), "vllm", "no"),
        (GPTQ, "transformers", "native"),
        (GPTQ, "vllm", "native"),
        (replace(GPTQ, schemes=frozenset([W3])), "vllm", "no"),
        (replace(GPTQ, schemes=frozenset([W4_ASYM])), "vllm", "no"),
        (replace(GPTQ, schemes=frozenset([Scheme(4, True, 16)])), "vllm", "no"),
        (replace(GPTQ, schemes=frozenset([Scheme(4, True, None)])), "vllm", "native"),
        (replace(GPTQ, kinds=frozenset(["experts"])), "transformers", "no"),
        (replace(GPTQ, kinds=frozenset(["subclass"])), "transformers", "no"),
        (replace(GPTQ, kinds=frozenset(["conv1d"])), "transformers", "no"),
        (replace(AWQ, model_type="llama"), "transformers", "native"),
        (replace(AWQ, model_type="gpt_neox"), "transformers", "no"),
        (replace(AWQ, model_type="gpt_neox"), "vllm", "native"),
        (Stored("bnb", frozenset(["experts", "linear"])), "transformers", "no"),
        (Stored("bnb", frozenset(["conv1d"])), "transformers", "native"),
        (Stored("bnb", frozenset(["linear"])), "vllm", "plugin"),
        (Stored("dense", frozenset(["experts", "conv1d"])), "transformers", "native"),
    ],
)
def test_rules(stored: Stored, runtime: str, support: str) -> None:
    assert entry(stored, runtime).support == support  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", [GPTQ, AWQ])
def test_what_a_cpu_does_not_run_is_told(stored: Stored) -> None:
    per_channel = replace(stored, schemes=frozenset([Scheme(4, True, None)]))
    assert "CPU" in entry(per_channel, "transformers").reason and "CPU" not in entry(stored, "transformers").reason


def test_families_of_gguf_are_those_whose_names_are_known() -> None:
    assert set(GGUF_NAMES) == GGUF_FAMILIES
