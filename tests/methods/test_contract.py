"""What every method must keep to; new files in methods/ are found by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tensors
from torch import Tensor

from llmshrink.forms import decode, join_rows, split_rows
from llmshrink.methods import load_method, method_names
from llmshrink.methods.base import Method, method_name
from llmshrink.statistics import Statistic

SHAPE = (24, 64)
# Of the norm of normal weights: what has two or three values, and what drops half of them; others 0.2.
ROUGH = {
    "ternary": 0.5,
    "binary": 0.7,
    "magnitude": 0.4,
    "wanda": 0.5,
    "sparsegpt": 0.7,
    "random": 0.8,
    **dict.fromkeys(("svd", "asvd", "svdllm"), 0.6),
}


def make(name: str) -> Method[Any]:
    method = load_method(name)
    given = {"group_size": 32} if "group_size" in method.Config.model_fields else {}
    return method(method.Config(**given))


def gathered(method: Method[Any], width: int = SHAPE[1], dead: int = 0) -> Statistic:
    statistic = method.statistic(width, torch.device("cpu"))
    x = torch.randn(200, width, generator=torch.Generator().manual_seed(2))
    x[:, :dead] = 0
    statistic.update(x)
    statistic.finish()
    return statistic


@pytest.fixture(params=method_names())
def method(request: pytest.FixtureRequest) -> Method[Any]:
    return make(request.param)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_form_promised_is_the_form_made(method: Method[Any], dtype: torch.dtype) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(dtype)
    made = method.compress(weight, method.prepare(gathered(method)))
    promised = method.form(SHAPE, dtype)
    assert [(n, t.shape, t.dtype) for n, t in tensors(made.weight)] == [
        (n, t.shape, t.dtype) for n, t in tensors(promised.weight)
    ]
    assert all(t.is_meta for n, t in tensors(promised.weight) if n != ".levels")  # a fixed table is real
    assert all(t.is_contiguous() for _, t in tensors(made.weight))
    rest = (decode(made.weight) - weight.float()).norm() / weight.float().norm()
    assert rest < ROUGH.get(method_name(method), 0.2)


def test_the_same_twice_and_nothing_changed(method: Method[Any]) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    statistic = gathered(method)
    before = [weight.clone(), *(v.clone() for v in vars(statistic).values() if isinstance(v, Tensor))]
    prepared = method.prepare(statistic)
    first, second = (method.compress(weight, prepared) for _ in range(2))
    for (_, one), (_, other) in zip(tensors(first.weight), tensors(second.weight), strict=True):
        assert torch.equal(one, other)
    after = [weight, *(v for v in vars(statistic).values() if isinstance(v, Tensor))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_inputs_that_are_always_zero_keep_their_weights(method: Method[Any]) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    values = decode(method.compress(weight, method.prepare(gathered(method, dead=8))).weight)
    assert values.isfinite().all()
    if method.task == "prune":  # they are the first to go
        return
    allowed = ROUGH.get(method_name(method), 0.2)
    assert (values[:, :8] - weight[:, :8]).norm() < allowed * weight[:, :8].norm()


def test_every_setting_is_described(method: Method[Any]) -> None:
    assert all(field.description for field in method.Config.model_fields.values())


def test_odd_shapes_are_refused_before_any_work(method: Method[Any]) -> None:
    if "group_size" in method.Config.model_fields and getattr(method.config, "bits", 1):
        assert "does not divide" in str(method.check((24, 50)))
    assert method.check(SHAPE) is None


def test_rows_that_are_said_not_to_depend_on_each_other_do_not(method: Method[Any]) -> None:
    weights = [torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (24, 8, 16)]
    prepared = method.prepare(gathered(method))
    stacked = method.compress(torch.cat(weights), prepared)
    if not method.by_row:
        if method.task == "prune":  # a mask can be cut, but not chosen in parts
            return
        with pytest.raises(ValueError, match="span rows"):
            split_rows(stacked, [24, 8, 16])
        return
    for (_, one), (_, other) in zip(
        tensors(stacked), tensors(join_rows(split_rows(stacked, [24, 8, 16]))), strict=True
    ):
        assert torch.equal(one, other)
    for weight, part in zip(weights, split_rows(stacked, [24, 8, 16]), strict=True):
        alone = decode(method.compress(weight, prepared).weight)
        assert (decode(part.weight) == alone).float().mean() > 0.99  # sums in another order may break a tie
