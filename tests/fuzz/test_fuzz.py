"""Readers of foreign bytes give a valid result or one of llmshrink's own errors, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz.targets import TARGETS, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

STRANGE = [b"", b"null", b"[]", b"{}", b"0", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"\0" * 99]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about sizes of zero
# What once broke a reader: the value put at a path of the first seed.
FOUND: list[tuple[str, tuple[Any, ...], Any]] = [
    ("container", ("c", "data_offsets", 1), None),
    ("container", ("c", "data_offsets"), [70, 70, 70]),
    ("container", ("a", "shape"), [-4, -4]),
    ("quant_state", ("shape",), ""),
    ("quant_state", ("dtype",), "nn"),
    ("quant_state", ("nested_blocksize",), 0),
    ("quant_state", ("nested_blocksize",), 10**30),
    ("quant_state", ("nested_offset",), []),
    ("configuration", ("model_type",), []),
    ("configuration", ("architectures",), True),
    ("configuration", ("hidden_size",), True),
    ("configuration", ("hidden_size",), 0),
    ("configuration", ("vocab_size",), 10**30),
    ("configuration", ("num_attention_heads",), -1),
    ("configuration", ("num_hidden_layers",), 10**30),
    ("configuration", ("hidden_act",), ""),
    ("configuration", ("rope_parameters", "rope_type"), []),
    ("configuration", ("rope_parameters", "rope_theta"), None),
    ("configuration", ("dtype",), ""),
    ("configuration", ("initializer_range",), 1e308),
    ("manifest", ("files", "x" * 300), {"sha256": "0"}),
    ("journal", (), True),
    ("journal", (1,), {}),
    ("journal", (1, "files"), None),
    ("rows", (), {}),
    ("rows", ("tokens",), None),
    ("rows", ("tokens", 0), 10**30),
    ("rows", ("events",), None),
]

LEAVES = [None, True, -1, 0, 3, 10**30, 0.5, 1e308, "", "x", "../x", "/x", "\0", "\ud800", "x" * 300, "float16"]
VALUES = st.sampled_from([*LEAVES, [], {}, [[]], [[], {}], {"a": 1}, ["x"], [-1], [1, 10**12], {"": None}])
# The same in every run of the tests: what a run finds, the next one finds.
STEADY = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=5000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return TARGETS[request.param](tmp_path_factory.mktemp(request.param))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a value."""
    yield at
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(below, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a path."""
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(value[at[0]], at[1:], new) if at[1:] else new
    return copy


def spoil_values(data: st.DataObject, target: Target) -> bytes:
    value = target.plain(data.draw(st.sampled_from(target.seeds)))
    for _ in range(data.draw(st.integers(1, 2))):
        value = replaced(value, data.draw(st.sampled_from(list(places(value)))), data.draw(VALUES))
    return target.written(value)


def spoil_bytes(data: st.DataObject, target: Target) -> bytes:
    seed = data.draw(st.sampled_from(target.seeds))
    at, cut = data.draw(st.integers(0, len(seed))), data.draw(st.integers(0, 8))
    return seed[:at] + data.draw(st.binary(max_size=8)) + seed[at + cut :]


def test_what_is_valid_is_read(target: Target) -> None:
    assert all(target.run(seed) for seed in target.seeds)


@STEADY
@given(st.data())
def test_another_value_is_read_or_refused(target: Target, data: st.DataObject) -> None:
    target.run(spoil_values(data, target))


@STEADY
@given(st.data())
def test_other_bytes_are_read_or_refused(target: Target, data: st.DataObject) -> None:
    target.run(spoil_bytes(data, target))


@pytest.mark.parametrize("data", STRANGE, ids=lambda data: data[:5].hex())
def test_what_is_no_file_of_its_kind_is_refused(target: Target, data: bytes) -> None:
    target.run(data)


@pytest.mark.parametrize(("name", "at", "value"), FOUND, ids=[f"{name}-{at}" for name, at, _ in FOUND])
def test_what_once_broke_a_reader(tmp_path: Path, name: str, at: tuple[Any, ...], value: Any) -> None:
    target = TARGETS[name](tmp_path)
    target.run(target.written(replaced(target.plain(target.seeds[0]), at, value)))
