"""YAML 1.2, with limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmshrink.errors import RecipeError, UnsafeError
from llmshrink.recipe import text

SCALARS = {
    "1e-4": 1e-4,
    "no": "no",
    "on": "on",
    "yes": "yes",
    "010": 10,
    "0o10": 8,
    "0x10": 16,
    "12:30": "12:30",
    "2024-01-01": "2024-01-01",
    "1_000": "1_000",
    "true": True,
    "~": None,
    "": None,
    "-3": -3,
    "+.5": 0.5,
    "1.": 1.0,
    "'1'": "1",
    "=": "=",
    "<<": "<<",
}


@pytest.mark.parametrize(("written", "meant"), SCALARS.items())
def test_core_schema(written, meant):
    found = text.parse(f"key: {written}", "here")["key"]
    assert found == meant
    assert type(found) is type(meant)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(list(SCALARS)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_what_is_written_is_read_back(data):
    assert text.parse(text.write(data), "here") == data


def bomb():
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join(lines)


MISTAKES = {
    "twice": ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' is there twice"),
    "twice below": ("x:\n  - {b: 1, b: 2}", "'b' is there twice"),
    "two documents": ("a: 1\n---\nb: 2", "single document"),
    "not yaml": ("a: [1", "line 1"),
    "key": ("[1]: 2", "a key must be one word"),
    "control": ("a: \x07", "not YAML"),
    "digits": ("a: " + "9" * 10_000, "line 1, column 4: a number of 10,000 digits"),
    "hexadecimal digits": ("a: 0x" + "f" * 10_000, "a number of 10,002 digits"),
}
ATTACKS = {
    "python": ("a: !!python/object/apply:os.system [echo]", "tag .* is not allowed"),
    "core tag": ("a: !!str 5", "tag .* is not allowed"),
    "own tag": ("a: !x 5", "tag .* is not allowed"),
    "deep": ("[" * 40 + "]" * 40, "deeper than 32"),
    "very deep": ("[" * 100_000, "deeper than 32"),
    "aliases": ("a: &a 1\nb: [" + "*a," * 101 + "]", "more than 100 aliases"),
    "bomb": (bomb(), "stand for more than 20,000 values"),
    "many": ("- a\n" * 30_000, "more than 20,000 values"),
    "itself": ("a: &a [*a]", "contains itself"),
    "large": ("# " + "x" * 1_000_001, "larger than"),
}
REFUSED = {
    **{name: (RecipeError, *case) for name, case in MISTAKES.items()},
    **{name: (UnsafeError, *case) for name, case in ATTACKS.items()},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    kind, written, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        text.parse(written, "here")


def test_merge_key_is_an_ordinary_key():
    assert text.parse("a: &a {x: 1}\nb: {<<: *a}", "here")["b"] == {"<<": {"x": 1}}
