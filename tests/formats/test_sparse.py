"""The sparse format: the same bits back, exactly as many bytes as arithmetic says, and no silent loading elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tensors
from torch import Tensor

from llmshrink.formats import format_of
from llmshrink.formats.base import Slot
from llmshrink.formats.sparse import FORMAT
from llmshrink.forms import Layer, Sparse, decode
from llmshrink.methods.sparsegpt import SparseGpt, SparseGptConfig
from llmshrink.methods.sparsity import RowConfig, keep_highest, pruned
from llmshrink.statistics import Hessian

SHAPE = (40, 96)


def slot(dtype: torch.dtype) -> Slot:
    return Slot("a.b.weight", "a.b", SHAPE, dtype)


def made(dtype: torch.dtype, pattern: str | None = None, share: float = 0.5) -> Layer:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    config = RowConfig(sparsity=None if pattern else share, pattern=pattern)
    return Layer(pruned(weight.float(), keep_highest(weight.float().abs(), config, "matrix"), config, dtype))


def rounded(bits: int, *, symmetric: bool, pattern: str | None = None) -> Layer:
    statistic = Hessian(SHAPE[1], torch.device("cpu"))
    statistic.update(torch.randn(300, SHAPE[1], generator=torch.Generator().manual_seed(1)))
    statistic.finish()
    config = SparseGptConfig(
        sparsity=None if pattern else 0.5, pattern=pattern, bits=bits, group_size=32, symmetric=symmetric
    )  # type: ignore[arg-type]
    method = SparseGpt(config, torch.bfloat16)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    return method.compress(weight, method.prepare(statistic))


def there_and_back(layer: Layer, dtype: torch.dtype) -> tuple[dict[str, Tensor], Sparse]:
    assert FORMAT.check(slot(dtype), layer) is None
    packed = FORMAT.pack(slot(dtype), layer)
    config = FORMAT.config([(slot(dtype), layer)], [], dtype)
    form = FORMAT.unpack(slot(dtype), packed.__getitem__, config)
    assert isinstance(form, Sparse)
    promised = FORMAT.pack(slot(dtype), FORMAT.meta(config["layers"]["a.b"]))  # type: ignore[index]
    assert {k: (t.shape, t.dtype) for k, t in promised.items()} == {k: (t.shape, t.dtype) for k, t in packed.items()}
    assert FORMAT.dense_info("a.b.weight", packed.__getitem__, config) == (SHAPE, dtype)
    assert format_of(config) is FORMAT
    return packed, form


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", [None, "2:4", "4:8", "1:4", "8:16", "5:12"])
def test_floats_come_back_bit_for_bit(pattern: str | None, dtype: torch.dtype) -> None:
    layer = made(dtype, pattern)
    packed, form = there_and_back(layer, dtype)
    assert isinstance(layer.weight, Sparse)
    for (_, one), (_, other) in zip(tensors(layer.weight), tensors(form), strict=True):
        assert torch.equal(one, other)
    assert packed["a.b.weight"].dtype == torch.uint8
    assert packed["a.b.weight"].ndim == 1  # which no loader takes for a matrix
    assert len(packed["a.b.weight"]) == layer.weight.kept * dtype.itemsize


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_come_back_bit_for_bit(bits: int, symmetric: bool, pattern: str | None) -> None:
    layer = rounded(bits, symmetric=symmetric, pattern=pattern)
    packed, form = there_and_back(layer, torch.bfloat16)
    assert torch.equal(decode(form), decode(layer.weight))
    assert torch.equal(decode(form.values), decode(form))  # zeros where nothing is kept
    assert len(packed["a.b.weight"]) == 4 * math.ceil(form.kept * bits / 32)


def test_bytes_are_what_arithmetic_says() -> None:
    numel = SHAPE[0] * SHAPE[1]

    def share(layer: Layer, dense: float) -> float:
        packed = FORMAT.pack(slot(torch.bfloat16), layer)
        return sum(t.nbytes for t in packed.values()) / (dense * numel)

    assert share(made(torch.bfloat16), 2) == pytest.approx(0.5 + 1 / 16)  # half the values, and a bit for each
    assert share(made(torch.bfloat16, "2:4"), 2) == pytest.approx(0.5 + 3 / 4 / 16, abs=1e-3)  # 3 bits for 4
    assert share(rounded(8, symmetric=True), 1 + 2 / 32) <= 0.65


@pytest.mark.parametrize("share", [0.0, 0.013, 0.987])
def test_hardly_any_or_nearly_all(share: float) -> None:
    layer = made(torch.bfloat16, share=share)
    assert torch.equal(decode(there_and_back(layer, torch.bfloat16)[1]), decode(layer.weight))


def test_a_matrix_of_all_weights_is_refused() -> None:
    layer = made(torch.bfloat16)
    assert isinstance(layer.weight, Sparse)
    assert "no weight is dropped" in str(FORMAT.check(slot(torch.bfloat16), Layer(layer.weight.values)))


def test_another_version_is_not_read() -> None:
    config = FORMAT.config([(slot(torch.bfloat16), made(torch.bfloat16))], [], torch.bfloat16)
    assert FORMAT.cannot_read(config) is None
    assert "version 2" in str(FORMAT.cannot_read({**(config or {}), "format_version": 2}))
    assert format_of({**(config or {}), "format": "braided"}) is None
