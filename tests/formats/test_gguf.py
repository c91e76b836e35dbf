"""The format GGUF: what methods make is packed, read back, and read by gguf-py to the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from llmshrink.block_types import BLOCK_TYPES
from llmshrink.errors import InputError
from llmshrink.formats import load_format
from llmshrink.formats.base import Slot
from llmshrink.forms import Dense, Layer, decode
from llmshrink.methods import load_method

SHAPE = (24, 512)
SLOT = Slot("a.b.weight", "a.b", SHAPE, torch.bfloat16)
GGUF = load_format("gguf")
CASES: list[tuple[str, dict[str, Any], str]] = [
    *((method, {"type": name}, name) for method in ("rtn", "gptq") for name in BLOCK_TYPES),
    *(
        ("cast", {"dtype": dtype}, name)
        for dtype, name in (("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32"))
    ),
]


def compress(method: str, settings: dict[str, Any]) -> tuple[Layer, Layer]:
    made = load_method(method)
    instance = made(made.Config(**settings), GGUF.scale_dtype(torch.bfloat16))
    statistic = instance.needs(SHAPE[1], torch.device("cpu"))
    statistic.update(torch.randn(600, SHAPE[1], generator=torch.Generator().manual_seed(1)))
    statistic.finish()
    weight = (0.05 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))).to(torch.bfloat16)
    return instance.compress(weight, instance.prepare(statistic)), instance.form(SHAPE, torch.bfloat16)


@pytest.mark.parametrize(("method", "settings", "name"), CASES)
def test_a_file_holds_what_the_method_made(method: str, settings: dict[str, Any], name: str) -> None:
    layer, empty = compress(method, settings)
    assert GGUF.check(SLOT, empty) is None
    packed, planned = GGUF.pack(SLOT, layer), GGUF.pack(SLOT, empty)
    assert list(packed) == [f"a.b.weight.{name}"]
    assert {n: (t.shape, t.dtype) for n, t in packed.items()} == {n: (t.shape, t.dtype) for n, t in planned.items()}
    config = GGUF.config([(SLOT, empty)], [], torch.bfloat16)
    weight = decode(layer.weight)
    assert torch.equal(decode(GGUF.unpack(SLOT, packed.__getitem__, config)), weight)
    stored = packed[f"a.b.weight.{name}"].view(torch.uint8).numpy()
    assert torch.equal(torch.from_numpy(dequantize(stored, GGMLQuantizationType[name])), weight)
    assert GGUF.dense_names(packed) == {"a.b.weight": f"a.b.weight.{name}"}
    assert GGUF.companions("a.b.weight", packed) == list(packed)
    assert GGUF.dense_info("a.b.weight", packed.__getitem__, config)[0] == SHAPE
    assert GGUF.cannot_read(config) is None


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_one_flipped_bit_is_seen(name: str) -> None:
    layer, _ = compress("rtn", {"type": name})
    packed = GGUF.pack(SLOT, layer)
    middle = BLOCK_TYPES[name].bytes // 2
    packed[f"a.b.weight.{name}"][3, middle] ^= 64
    assert not torch.equal(decode(GGUF.unpack(SLOT, packed.__getitem__, None)), decode(layer.weight))


def test_what_it_cannot_hold_is_refused() -> None:
    even, _ = compress("rtn", {"bits": 3, "group_size": 32})
    assert "Q4_K" in str(GGUF.check(SLOT, even))
    assert "F16" in str(GGUF.check(SLOT, Layer(Dense(torch.zeros(SHAPE, dtype=torch.float64)))))


def test_broken_tensors_are_named() -> None:
    packed = GGUF.pack(SLOT, compress("rtn", {"type": "Q4_K"})[0])
    key = "a.b.weight.Q4_K"
    with pytest.raises(InputError, match="no tensor of a known type"):
        GGUF.unpack(SLOT, {}.__getitem__, None)
    with pytest.raises(InputError, match="no matrix of this type"):
        GGUF.unpack(SLOT, {key: packed[key].short()}.__getitem__, None)
    with pytest.raises(InputError, match="whole blocks of Q4_K"):
        GGUF.unpack(SLOT, {key: packed[key][:, 1:]}.__getitem__, None)
    with pytest.raises(InputError, match="not \\[24, 512\\]"):
        GGUF.unpack(SLOT, {key: packed[key][1:]}.__getitem__, None)


def test_widths_that_are_not_whole_blocks_are_refused_at_plan_time() -> None:
    for method in ("rtn", "gptq"):
        made = load_method(method)
        assert "blocks of 256" in str(made(made.Config(type="Q4_K")).check((8, 288)))
        assert made(made.Config(type="Q8_0")).check((8, 288)) is None
