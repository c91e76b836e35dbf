# ruff: noqa: N803, N806 - W and H are the papers' symbols
"""Products of factors against the singular value decomposition, and against every choice of rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from correlated import WIDTH, hessian, normal
from torch import Tensor

from llmshrink.forms import Codebook, Dense, LowRank, Quantized, Sum, applied, decode
from llmshrink.methods import load_method
from llmshrink.methods.base import Method
from llmshrink.methods.hessian import Factors
from llmshrink.methods.lowrank import LowRankConfig, LowRankMethod, pivots
from llmshrink.methods.metric import Metric, spectrum
from llmshrink.statistics import Hessian, Magnitude, NoStatistic

NAMES = ("svd", "asvd", "svdllm")
SHAPES = [(24, WIDTH), (WIDTH, WIDTH), (2 * WIDTH, WIDTH)]


def make(name: str, **settings: Any) -> LowRankMethod:
    method = load_method(name)
    made = method(method.Config(**settings))
    assert isinstance(made, LowRankMethod)
    return made


def compressed(method: Method[Any], weight: Tensor) -> Any:
    statistic = hessian() if method.statistic is Hessian else method.statistic(WIDTH, torch.device("cpu"))
    if isinstance(statistic, Magnitude):
        statistic.mean, statistic.tokens = hessian().matrix.diagonal().sqrt(), 100
    return method.compress(weight, method.prepare(statistic))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_product_of_that_rank_is_nearer(name: str, shape: tuple[int, int]) -> None:
    W, method = normal(shape).float(), make(name, rank=5, pivots=False)
    layer = compressed(method, W)
    assert isinstance(layer.weight, LowRank)
    metric = {"svd": Metric(None), "asvd": Metric(hessian().matrix.diagonal().sqrt().double())}.get(name)
    if metric is None:
        prepared = method.prepare(hessian())
        assert isinstance(prepared, Factors)
        metric = Metric(prepared.H, prepared.damp)
    own = float(metric.error(W.double() - decode(layer.weight)).sum())
    assert own == pytest.approx(float(spectrum(W.double(), metric)[5:].sum()), rel=1e-5)
    by_rows = compressed(make(name, rank=5, pivots=True), W)
    assert float(metric.error(W.double() - decode(by_rows.weight)).sum()) == pytest.approx(own, rel=1e-4)
    assert isinstance(by_rows.weight, LowRank) and by_rows.weight.pivots is not None
    numbers = [f.weight.left.weight.numel() + f.weight.right.weight.numel() for f in (layer, by_rows)]
    assert numbers == [5 * sum(shape), 5 * sum(shape) - 25]


def test_by_outputs_svdllm_is_nearest_then_asvd() -> None:
    W, H = normal((WIDTH, WIDTH)).float(), Metric(hessian().matrix, 0)
    errors = [float(H.error(W.double() - decode(compressed(make(n, keep=0.5), W).weight)).sum()) for n in NAMES]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("rank", [1, 4, 23])
def test_pivots_make_all_rows_with_small_shares(rank: int) -> None:
    U = torch.linalg.qr(normal((24, rank)))[0]
    chosen = pivots(U)
    assert int(chosen.sum()) == rank
    shares = torch.linalg.solve(U[chosen].T, U[~chosen].T).T
    assert torch.allclose(shares @ U[chosen], U[~chosen]) and float(shares.abs().max()) < 4


@pytest.mark.parametrize("shape", [(256, 256), (128, 256), (768, 256), (7, 300)])
@pytest.mark.parametrize("by_rows", [True, False])
def test_the_rank_is_the_largest_that_keeps_the_share(shape: tuple[int, int], by_rows: bool) -> None:
    whole = math.prod(shape)
    for keep in (0.1, 0.5, 0.8, 0.99):
        config = LowRankConfig(keep=keep, pivots=by_rows)
        rank = config.rank_of(shape)
        assert config.numbers(shape, rank) <= keep * whole + 0.5
        assert rank == min(shape) or config.numbers(shape, rank + 1) > keep * whole
    config = LowRankConfig(pivots=by_rows)
    most = config.most(shape)
    assert config.numbers(shape, most) < whole and (most + 1 >= min(shape) or config.numbers(shape, most + 1) >= whole)
    for rank in range(1, most + 1):  # as the search for ranks says them
        keys = config.at(1 - config.numbers(shape, rank) / whole)
        assert keys is not None and LowRankConfig(pivots=by_rows, **keys).rank_of(shape) == rank
    assert config.at(0.0) is None


def test_inputs_that_are_always_zero_are_told() -> None:
    method = make("asvd")
    statistic = method.statistic(WIDTH, torch.device("cpu"))
    statistic.update(torch.ones(4, WIDTH) * (torch.arange(WIDTH) > 4))
    statistic.finish()
    assert [event.kind for event in method.prepare(statistic).events] == ["dead_columns"]


def test_no_factor_is_much_larger_than_the_other() -> None:
    """In float16 what stands between them must stay finite where the outputs do."""
    W = (normal((1024, 1)) @ normal((1, WIDTH)) * 20).half()
    layer = compressed(make("svd", rank=8, pivots=False), W)
    x = torch.sign(W[0]).half() * 4
    assert (W @ x).isfinite().all() and applied(layer.weight, x).isfinite().all()


def test_what_says_the_rank_is_said_once() -> None:
    for other in ({"rank": 4}, {"bits": 2}):
        with pytest.raises(ValueError, match="says how many numbers are kept"):
            LowRankConfig(keep=0.5, **other)


def test_ranks_that_save_nothing_are_refused() -> None:
    assert "the largest that does is 127" in str(make("svd", rank=128, pivots=False).check((256, 256)))
    assert make("svd", rank=127, pivots=False).check((256, 256)) is None
    assert "the largest that does is 255" in str(make("svd", rank=256).check((256, 256)))
    assert make("svd", rank=255).check((256, 256)) is None
    assert "leaves no rank" in str(make("svd", keep=0.001).check((32, 32)))


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_factors_can_be_codes(by_rows: bool, bits: int) -> None:
    W = normal((48, WIDTH)).float()
    layer = compressed(make("svdllm", rank=12, pivots=by_rows, factor_bits=bits), W)
    assert isinstance(layer.weight, LowRank)
    for factor in (layer.weight.left, layer.weight.right):
        assert isinstance(factor, Quantized) and factor.bits == bits and factor.zero is None
    assert isinstance(layer.weight.left, Quantized)
    assert layer.weight.left.block == ((1, 12) if by_rows else (48, 1))
    metric = Metric(hessian().matrix, 0)
    plain = compressed(make("svdllm", rank=12, pivots=by_rows), W)
    floats, codes = (float(metric.error(W.double() - decode(found.weight)).sum()) for found in (plain, layer))
    assert codes < {2: 4, 4: 1.4, 8: 1.01}[bits] * floats


@pytest.mark.parametrize("name", NAMES)
def test_codes_of_the_rest_and_factors_fit_each_other(name: str) -> None:
    W, H = normal((48, WIDTH)).float(), Metric(hessian().matrix, 0)
    spiked = W + 3 * torch.outer(W[:, 0], torch.ones(WIDTH))
    once, often = (compressed(make(name, bits=2, rank=2, rounds=rounds), spiked) for rounds in (1, 6))
    for layer in (once, often):
        assert isinstance(layer.weight, Sum) and layer.objective is not None and layer.objective.share < 1
        product, codes = layer.weight.parts
        assert isinstance(product, LowRank) and product.pivots is None and isinstance(codes, Codebook)
        assert torch.allclose(decode(layer.weight), decode(product) + decode(codes))
    assert often.objective.share <= once.objective.share
    if name == "svdllm":
        alone = decode(compressed(make(name, rank=2), spiked).weight)
        both = decode(often.weight)
        assert float(H.error(spiked.double() - both).sum()) < 0.5 * float(H.error(spiked.double() - alone).sum())


def test_factors_that_gain_little_are_told() -> None:
    flat = compressed(make("svd", bits=3, rank=8), normal((WIDTH, WIDTH)).float())
    assert [event.kind for event in flat.events] == ["correction_poor"]
    spike = torch.outer(normal((WIDTH, 1))[:, 0], torch.ones(WIDTH, dtype=torch.float64)) * 10
    assert not compressed(make("svd", bits=3, rank=1), (spike + normal((WIDTH, WIDTH))).float()).events


@pytest.mark.parametrize("name", ["svdllm", "asvd"])
@pytest.mark.parametrize("value", [None, torch.inf])
def test_nothing_known_of_the_inputs_is_told(name: str, value: float | None) -> None:
    method, W = make(name), normal((24, WIDTH)).float()
    statistic = method.statistic(WIDTH, torch.device("cpu"))
    if value is not None:
        statistic.update(torch.full((3, WIDTH), value))
        statistic.finish()
    prepared = method.prepare(statistic)
    assert [event.kind for event in prepared.events] == ["svd_fallback"]
    plain = make("svd")
    alone = plain.compress(W, plain.prepare(NoStatistic(WIDTH, torch.device("cpu"))))
    assert torch.equal(decode(method.compress(W, prepared).weight), decode(alone.weight))


@pytest.mark.parametrize(
    "weight", [torch.zeros(24, WIDTH), torch.ones(24, WIDTH), normal((24, 3)) @ normal((3, WIDTH))]
)
@pytest.mark.parametrize("name", NAMES)
def test_matrices_of_lower_rank_come_back(name: str, weight: Tensor) -> None:
    layer = compressed(make(name, rank=20), weight.float())
    assert isinstance(layer.weight, LowRank) and isinstance(layer.weight.left, Dense)
    assert torch.allclose(decode(layer.weight), weight.float(), atol=1e-3)
