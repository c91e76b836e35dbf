"""Limits as people write them, and that they come back the same."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmshrink.errors import RecipeError
from llmshrink.recipe import load
from llmshrink.recipe.json_schema import json_schema
from llmshrink.recipe.units import Size


def gated(**keys):
    return {"version": 1, "stages": [{"task": "quantize", "gate": keys}]}


def again(recipe):
    return load.validate(load.text.parse(load.dump(recipe), "dump"))


WRITTEN = [
    ("max_ppl_increase", "3%", 0.03),
    ("max_ppl_increase", " 3 % ", 0.03),
    ("max_ppl_increase", 0.03, 0.03),
    ("max_ppl_increase", "0.03", 0.03),
    ("max_ppl_increase", "0.7%", 0.007),
    ("max_ppl_increase", "150%", 1.5),
    ("max_ppl_increase", 0, 0.0),
    ("max_kl", 0.02, 0.02),
    ("max_kl", 1, 1.0),
    ("min_top1", "97%", 0.97),
    ("min_top1", "100%", 1.0),
    ("max_size", "3.5GiB", Size(bytes=3_758_096_384)),
    ("max_size", "500 MB", Size(bytes=500_000_000)),
    ("max_size", 123, Size(bytes=123)),
    ("max_size", "123", Size(bytes=123)),
    ("max_size", "30%", Size(share=0.3)),
    ("max_size", None, None),
]


@pytest.mark.parametrize(("key", "written", "meant"), WRITTEN)
@pytest.mark.parametrize(
    "task", [{"task": "quantize"}, {"task": "export", "format": {"name": "dense"}}, {"task": "eval"}]
)
def test_what_is_written_is_meant_and_comes_back(task, key, written, meant):
    recipe = load.validate({"version": 1, "stages": [{**task, "gate": {key: written}}]})
    assert getattr(recipe.stages[0].gate, key) == meant
    assert load.dump(again(recipe)) == load.dump(recipe)
    assert getattr(again(recipe).stages[0].gate, key) == meant


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 2**63 - 1))
def test_no_digit_is_lost(share, size):
    recipe = load.validate(gated(max_ppl_increase=share, min_top1=share, max_size=size))
    assert again(recipe).stages[0].gate == recipe.stages[0].gate


REFUSED = [
    ("max_ppl_increase", 3, "write 3%"),
    ("max_ppl_increase", 1, "write 1%"),
    ("max_ppl_increase", "3", "write 3%"),
    ("max_ppl_increase", -0.1, "greater than or equal to 0"),
    ("max_ppl_increase", "-3%", "a share such as 3%"),
    ("max_ppl_increase", True, "a share such as 3%"),
    ("max_ppl_increase", "three", "a share such as 3%"),
    ("max_ppl_increase", "9" * 400 + "%", "a share such as 3%"),
    ("max_ppl_increase", math.nan, "finite"),
    ("min_top1", 97, "write 97%"),
    ("min_top1", "101%", "less than or equal to 1"),
    ("max_kl", "0.02", "valid number"),
    ("max_kl", -1, "greater than or equal to 0"),
    ("max_kl", math.inf, "finite"),
    ("max_size", 0.3, "or 30%"),
    ("max_size", True, "or 30%"),
    ("max_size", 0, "or 30%"),
    ("max_size", 10**400, "or 30%"),
    ("max_size", "5 apples", "byte unit: apples"),
    ("max_size", "many", "or 30%"),
    ("max_sise", 1, "did you mean 'max_size'?"),
]


@pytest.mark.parametrize(("key", "value", "words"), REFUSED)
def test_what_is_not_clear_is_refused(key, value, words):
    with pytest.raises(RecipeError) as caught:
        load.validate(gated(**{key: value}))
    (problem,) = caught.value.problems
    assert problem.startswith(f"stages[0].gate.{key}: ") and words in problem


def test_a_share_of_the_original():
    assert Size(share=0.3).of(1000) == 300
    assert Size(bytes=7).of(1000) == 7


def test_a_gate_decides_no_weight():
    plain = load.recipe_hash(load.validate(gated()))
    assert load.recipe_hash(load.validate(gated(max_kl=0.1, max_size="3GB"))) == plain


def test_a_flag_means_the_stage_of_its_command():
    data = {"version": 1, "stages": [{"task": "eval"}, {"task": "quantize"}]}
    with pytest.raises(RecipeError, match=r"stages\.0\.gate\.max_kl, stages\.1\.gate\.max_kl"):
        load.override(data, "gate.max_kl", 0.1)
    assert load.override(data, "gate.max_kl", 0.1, task="quantize")["stages"] == [
        {"task": "eval"},
        {"task": "quantize", "gate": {"max_kl": 0.1}},
    ]


def test_the_schema_for_editors_takes_the_same_words():
    properties = json_schema()["$defs"]["GateSpec"]["properties"]
    assert set(properties) == {"max_ppl_increase", "max_kl", "min_top1", "max_size"}
    assert all(entry["description"] for entry in properties.values())
    for key, written, _ in WRITTEN:
        patterns = patterns_of(properties[key])
        if isinstance(written, str) and written != "0.03":  # a number in quotes is for the command line
            assert any(re.search(pattern, written) for pattern in patterns), (key, written)
    assert not any(re.search(pattern, "3") for pattern in patterns_of(properties["max_ppl_increase"]))


def patterns_of(schema):
    inner = [pattern for form in schema.get("anyOf", []) for pattern in patterns_of(form)]
    return [schema["pattern"], *inner] if "pattern" in schema else inner
