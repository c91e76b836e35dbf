"""The codebook format: the same bits back, exactly as many bytes as arithmetic says."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_reads_packed, assert_reads_rows, tensors

from llmshrink.formats import format_of
from llmshrink.formats.base import Slot
from llmshrink.formats.codebook import FORMAT
from llmshrink.forms import Codebook, Dense, Layer, Scattered, Sum, check_blocks, decode


def made(bits: int, shape: tuple[int, int], groups: int, dtype: torch.dtype, dim: int = 1) -> Layer:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (shape[0], shape[1] // dim), generator=generator, dtype=torch.uint8)
    table = torch.randn(groups, 1 << bits, dim, generator=generator).sort(1).values
    scale = torch.rand(shape[0], generator=generator).bfloat16() if dim == 2 else None
    return Layer(Codebook(codes, table.to(dtype), bits, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "dim"), [((12, 64), 1), ((9, 50), 1), ((9, 50), 2), ((12, 64), 4)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_come_back(bits: int, shape: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    layer, slot = made(bits, shape, 3, dtype, dim), Slot("a.b.weight", "a.b", shape, dtype)
    assert FORMAT.check(slot, layer) is None
    packed = FORMAT.pack(slot, layer)
    config = FORMAT.config([(slot, layer)], [], dtype)
    assert config is not None and format_of(config) is FORMAT
    form = FORMAT.unpack(slot, packed.__getitem__, config)
    for (_, one), (_, other) in zip(tensors(layer.weight), tensors(form), strict=True):
        assert torch.equal(one, other)
    assert_reads_rows(FORMAT, slot, packed, config)
    promised = FORMAT.pack(slot, FORMAT.meta(config["layers"]["a.b"]))
    assert {k: (t.shape, t.dtype) for k, t in promised.items()} == {k: (t.shape, t.dtype) for k, t in packed.items()}
    assert FORMAT.dense_info("a.b.weight", packed.__getitem__, config) == (shape, dtype)
    assert packed["a.b.weight"].ndim == 1  # which no loader takes for a matrix
    assert len(packed["a.b.weight"]) == 4 * -(-shape[0] * shape[1] // dim * bits // 32)


@pytest.mark.parametrize("width", [50, 40000])
def test_weights_beside_codes_come_back(width: int) -> None:
    book, shape = made(3, (6, width), 2, torch.float16).weight, (6, width)
    there = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.05
    places = torch.int16 if width == 50 else torch.int32
    columns, counts = there.nonzero()[:, 1].to(places), there.sum(1).to(places)
    apart = Scattered(torch.randn(len(columns)).bfloat16(), columns, counts, width)
    layer, slot = Layer(Sum((book, apart))), Slot("a.b.weight", "a.b", shape, torch.float16)
    assert FORMAT.check(slot, layer) is None
    packed, config = FORMAT.pack(slot, layer), FORMAT.config([(slot, layer)], [], torch.float16)
    assert config is not None
    form = FORMAT.unpack(slot, packed.__getitem__, config)
    right = decode(book)
    right[there] += apart.values.float()
    assert torch.equal(decode(form), right)
    assert_reads_rows(FORMAT, slot, packed, config)
    promised = FORMAT.pack(slot, FORMAT.meta(config["layers"]["a.b"]))
    assert {k: (t.shape, t.dtype) for k, t in promised.items()} == {k: (t.shape, t.dtype) for k, t in packed.items()}
    packed["a.b.weight_apart_columns"][0] = -1
    with pytest.raises(ValueError, match="outside of"):
        FORMAT.unpack(slot, packed.__getitem__, config)
    with pytest.raises(ValueError, match="not those of"):
        check_blocks(Scattered(apart.values[1:], columns, counts, width))


@pytest.mark.parametrize(("bits", "dim"), [(2, 1), (3, 1), (4, 2), (8, 4)])
def test_packed_codes_mean_the_same(bits: int, dim: int) -> None:
    shape = (192, 256)
    layer, slot = made(bits, shape, 3, torch.float16, dim), Slot("a.b.weight", "a.b", shape, torch.float16)
    assert isinstance(layer.weight, Codebook)
    layer.weight.codes[::2] >>= 1  # small ones are more frequent
    config = FORMAT.config([(slot, layer)], [], torch.float16)
    assert config is not None
    assert_reads_packed(FORMAT, slot, FORMAT.pack(slot, layer), config)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_what_codes_mean(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    form = made(3, (12, 64), 4, torch.float32, dim).weight
    assert isinstance(form, Codebook)
    right = torch.stack([form.table[row // 3][form.codes[row].long()].flatten() for row in range(12)])
    right = right if form.scale is None else right * form.scale.float()[:, None]
    assert torch.equal(decode(form), right)
    monkeypatch.setattr("llmshrink.forms.kinds.LOOKED_UP", 100)
    assert torch.equal(decode(form), right)


def test_other_matrices_are_refused_and_damage_is_seen() -> None:
    slot = Slot("a.b.weight", "a.b", (12, 64), torch.float32)
    assert "no tables" in str(FORMAT.check(slot, Layer(Dense(torch.zeros(12, 64)))))
    layer = made(3, (12, 64), 4, torch.float32)
    packed, config = FORMAT.pack(slot, layer), FORMAT.config([(slot, layer)], [], torch.float32)
    short = {**packed, "a.b.weight": packed["a.b.weight"][:-4]}
    with pytest.raises(ValueError, match="are not 768 codes of 3 bits"):
        FORMAT.unpack(slot, short.__getitem__, config)
    packed["a.b.weight_table"] = packed["a.b.weight_table"][:, :7]
    with pytest.raises(ValueError, match="not for 12 rows of 3 bits"):
        FORMAT.unpack(slot, packed.__getitem__, config)
