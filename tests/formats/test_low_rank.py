"""The low-rank format: the same bits back, exactly as many bytes as arithmetic says, the same outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_reads_packed, assert_reads_rows, tensors

from llmshrink.formats import format_of
from llmshrink.formats.base import Slot
from llmshrink.formats.low_rank import FORMAT
from llmshrink.forms import Codebook, Dense, Layer, LowRank, Quantized, Sum, applied, check_blocks, decode
from llmshrink.methods import load_method
from llmshrink.methods.base import Prepared

KINDS: dict[str, dict[str, Any]] = {
    "rows": {"rank": 7},
    "plain": {"rank": 7, "pivots": False},
    "rows in codes": {"rank": 7, "factor_bits": 8},
    "codes": {"rank": 7, "pivots": False, "factor_bits": 3},
    "rest": {"rank": 3, "bits": 3},
    "rest beside rows": {"rank": 3, "bits": 2, "pivots": True, "factor_bits": 8},
}


def made(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
    method = load_method("svd")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    return method(method.Config(**KINDS[kind])).compress(weight, Prepared())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(24, 64), (33, 50)])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_come_back(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer, slot = made(kind, shape, dtype), Slot("a.b.weight", "a.b", shape, dtype)
    assert FORMAT.check(slot, layer) is None
    packed = FORMAT.pack(slot, layer)
    config = FORMAT.config([(slot, layer)], [], dtype)
    assert config is not None and format_of(config) is FORMAT
    form = FORMAT.unpack(slot, packed.__getitem__, config)
    check_blocks(form)
    for (_, one), (_, other) in zip(tensors(layer.weight), tensors(form), strict=True):
        assert torch.equal(one, other)
    assert_reads_rows(FORMAT, slot, packed, config)
    promised = FORMAT.pack(slot, FORMAT.meta(config["layers"]["a.b"]))
    assert {k: (t.shape, t.dtype) for k, t in promised.items()} == {k: (t.shape, t.dtype) for k, t in packed.items()}
    assert FORMAT.dense_info("a.b.weight", packed.__getitem__, config) == (shape, dtype)
    assert sorted(FORMAT.companions("a.b.weight", packed)) == sorted(packed)
    assert packed["a.b.weight"].shape != shape  # which no loader takes for the matrix
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(5))
    assert torch.allclose(applied(form, x), x @ decode(form).T, atol=1e-4)


@pytest.mark.parametrize("kind", ["rows in codes", "codes", "rest", "rest beside rows"])
def test_packed_codes_mean_the_same(kind: str) -> None:
    layer, slot = made(kind, (192, 256), torch.float32), Slot("a.b.weight", "a.b", (192, 256), torch.float32)
    config = FORMAT.config([(slot, layer)], [], torch.float32)
    assert config is not None
    parts = ["", "_right", *(["_rest"] if "rest" in kind else [])]
    assert list(FORMAT.code_bits(config)) == [f"a.b.weight{part}" for part in parts]
    assert_reads_packed(FORMAT, slot, FORMAT.pack(slot, layer), config)


def test_bytes_are_those_of_the_numbers() -> None:
    layer = made("rows", (24, 64), torch.bfloat16)
    packed = FORMAT.pack(Slot("a.weight", "a", (24, 64), torch.bfloat16), layer)
    assert sum(t.nbytes for t in packed.values()) == 2 * 7 * (24 + 64 - 7) + 3


def test_other_matrices_are_refused_and_damage_is_seen() -> None:
    slot = Slot("a.b.weight", "a.b", (24, 64), torch.float32)
    assert "this matrix is none" in str(FORMAT.check(slot, Layer(Dense(torch.zeros(24, 64)))))
    layer = made("rows", (24, 64), torch.float32)
    assert isinstance(layer.weight, LowRank)
    both = Layer(Sum((layer.weight, Dense(torch.zeros(24, 64)))))
    assert "tables of values only" in str(FORMAT.check(slot, both))
    odd = Layer(LowRank(layer.weight.left, Sum((layer.weight.right, layer.weight.right)), layer.weight.pivots))
    assert "of factors it holds" in str(FORMAT.check(slot, odd))
    config = FORMAT.config([(slot, layer)], [], torch.float32)
    packed = FORMAT.pack(slot, layer)
    packed["a.b.weight_pivots"] = packed["a.b.weight_pivots"] & 0
    with pytest.raises(ValueError, match="0 pivots are not those of rank 7"):
        FORMAT.unpack(slot, packed.__getitem__, config)
    packed = FORMAT.pack(slot, layer) | {"a.b.weight_right": torch.zeros(6, 64)}
    with pytest.raises(ValueError, match="a factor"):
        FORMAT.unpack(slot, packed.__getitem__, config)


def test_parts_that_do_not_fit_are_seen() -> None:
    left, right = Dense(torch.zeros(24, 3)), Dense(torch.zeros(3, 64))
    check_blocks(LowRank(left, right))
    with pytest.raises(ValueError, match="no product"):
        check_blocks(LowRank(left, Dense(torch.zeros(4, 64))))
    with pytest.raises(ValueError, match="are not those that stand for"):
        check_blocks(LowRank(left, right, torch.zeros(27, dtype=torch.bool)))
    with pytest.raises(ValueError, match="have no sum"):
        check_blocks(Sum((LowRank(left, right), Dense(torch.zeros(24, 63)))))
    table = Codebook(torch.zeros(24, 64, dtype=torch.uint8), torch.zeros(5, 4, 1), 2)
    with pytest.raises(ValueError, match="do not share"):
        check_blocks(Sum((LowRank(left, right), table)))
    scaled = replace(table, table=torch.zeros(6, 4, 1), scale=torch.ones(23))
    with pytest.raises(ValueError, match="23 scales are not those of 24 rows"):
        check_blocks(Sum((LowRank(left, right), scaled)))
    codes = Quantized(torch.zeros(3, 64, dtype=torch.int8), Dense(torch.zeros(3, 2)), None, None, (1, 64), 8)
    with pytest.raises(ValueError, match="do not cover"):
        check_blocks(LowRank(left, codes))


def test_a_factor_that_is_shared_is_stored_once() -> None:
    generator = torch.Generator().manual_seed(6)
    right = Dense(torch.randn(7, 64, generator=generator))
    slots = [Slot(f"{name}.weight", name, (24, 64), torch.float32) for name in ("a", "b")]
    layers = []
    for first, count in ((0, 4), (4, 3)):
        chosen = torch.zeros(24, dtype=torch.bool)
        chosen[torch.randperm(24, generator=generator)[:count]] = True
        left = Dense(torch.randn(24 - count, 7, generator=generator))
        layers.append(Layer(LowRank(left, right, chosen, first, "a")))
    config = FORMAT.config(zip(slots, layers, strict=True), [], torch.float32)
    assert config is not None
    packed = [FORMAT.pack(slot, layer) for slot, layer in zip(slots, layers, strict=True)]
    assert ["a.weight_right" in tensors for tensors in packed] == [True, False] and "b.weight_right" not in packed[1]
    assert FORMAT.borrowed(slots[0], layers[0]) == {}
    assert list(FORMAT.borrowed(slots[1], layers[1])) == ["a.weight_right"]
    stored = packed[0] | packed[1]
    assert set(FORMAT.dense_names(stored)) == {"a.weight", "b.weight"}
    x = torch.randn(2, 64, generator=generator)
    for slot, layer in zip(slots, layers, strict=True):
        assert FORMAT.check(slot, layer) is None
        form = FORMAT.unpack(slot, stored.__getitem__, config)
        check_blocks(form)
        assert torch.equal(decode(form), decode(layer.weight))
        assert isinstance(form, LowRank) and isinstance(layer.weight, LowRank) and isinstance(form.left, Dense)
        assert (form.own, form.shared) == (layer.weight.own, "a")
        assert form.pivots is not None
        assert torch.equal(decode(form)[form.pivots], right.weight[form.own])
        assert torch.allclose(decode(form)[~form.pivots], form.left.weight @ right.weight, atol=1e-5)
        assert torch.allclose(applied(form, x), x @ decode(form).T, atol=1e-4)
        meta = FORMAT.meta(config["layers"][slot.name])
        promised = FORMAT.pack(slot, meta)
        assert {k: t.shape for k, t in promised.items()} == {k: t.shape for k, t in FORMAT.pack(slot, layer).items()}


def test_a_shared_factor_that_does_not_fit_is_seen() -> None:
    chosen = torch.arange(24) < 3
    form = LowRank(Dense(torch.zeros(21, 7)), Dense(torch.zeros(7, 64)), chosen, 5, "a")
    with pytest.raises(ValueError, match="are not those that stand for"):
        check_blocks(form)
    with pytest.raises(ValueError, match="are not those that stand for"):
        check_blocks(LowRank(form.left, form.right, chosen, 0, None))
    slot = Slot("b.weight", "b", (24, 64), torch.float32)
    assert "only where rows" in str(FORMAT.check(slot, Layer(LowRank(form.left, form.right, None, 0, "a"))))
    layer = Layer(LowRank(form.left, form.right, chosen, 0, "a"))
    config = FORMAT.config([(slot, layer)], [], torch.float32)
    assert config is not None
    config["layers"]["b"]["own"] = [6, 9]
    with pytest.raises(ValueError, match="are not among the 7"):
        FORMAT.unpack(slot, FORMAT.pack(slot, layer).__getitem__, config)
