# ruff: noqa: N803, N806 - W and H are the papers' symbols
"""A right factor that matrices share, against the decomposition of all of them and against least squares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from correlated import WIDTH, hessian
from pydantic import ValidationError
from torch import Tensor

from llmshrink.forms import Dense, LowRank, check_blocks, decode
from llmshrink.methods.basis import Place, basis, directions, left_behind, mean, spread
from llmshrink.methods.metric import Metric, fitted
from llmshrink.methods.svdllm import SvdLlm, SvdLlmConfig

DOUBLE = torch.float64


def weights(out: int, count: int = 3) -> list[Tensor]:
    """Matrices that are alike, of different sizes."""
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(out, WIDTH, generator=generator, dtype=DOUBLE)
    own = torch.randn(count, out, WIDTH, generator=generator, dtype=DOUBLE)
    return [(n + 1) * (common + 0.3 * part) for n, part in enumerate(own)]


def metrics(count: int = 3) -> list[Metric]:
    return [Metric(hessian(seed=seed).matrix * 10**seed, 0.01) for seed in range(count)]


def exact(metric: Metric) -> Tensor:
    return metric.weigh(torch.eye(WIDTH, dtype=DOUBLE))


@pytest.mark.parametrize("out", [8, WIDTH, 2 * WIDTH])
def test_a_basis_is_that_of_all_on_top_of_each_other(out: int) -> None:
    """Under one metric, and where outputs are as large, no basis of any rank leaves less."""
    H = metrics(1)[0]
    alike = [W / float(H.error(W).sum()) ** 0.5 for W in weights(out)]
    rows = directions(alike, [H] * 3)
    assert rows.shape == (min(3 * out, WIDTH), WIDTH)
    root = torch.linalg.cholesky(exact(H))
    sizes = torch.linalg.svdvals(torch.cat(alike) @ root).square()
    lost = torch.stack([left_behind(W, rows, H) for W in alike]).sum(0)
    best = torch.cat([sizes.flip(0).cumsum(0).flip(0), sizes.new_zeros(1)])
    assert torch.allclose(lost, best, atol=1e-6)


def test_a_matrix_of_zeros_says_nothing() -> None:
    W, H = weights(10), metrics()
    assert bool(directions([W[0], W[0] * 0], H[:2]).isfinite().all())
    assert not directions([W[0] * 0] * 2, H[:2]).isnan().any()


def test_what_a_basis_loses_is_what_the_best_left_factor_loses() -> None:
    for W, H in zip(weights(20), metrics(), strict=True):
        rows = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
        lost = left_behind(W, rows, H)
        assert float(lost[0]) == 1
        for rank in (1, 7, 30):
            rest = W - fitted(W, rows[:rank], H) @ rows[:rank]
            assert float(lost[rank]) == pytest.approx(float(H.error(rest).sum() / H.error(W).sum()), rel=1e-5)


def test_no_block_decides_by_its_size_alone() -> None:
    matrices, known = weights(20), metrics()
    larger = [matrices[0], 1000 * matrices[1], matrices[2]]
    louder = [known[0], Metric(known[1].dense(WIDTH).float() * 100, 0), known[2]]
    one, other = directions(matrices, known)[:9], directions(larger, louder)[:9]
    seen = [torch.linalg.qr(rows.T)[0] for rows in (one, other)]
    assert float((seen[0].T @ seen[1]).square().sum()) == pytest.approx(9, rel=1e-5)
    assert mean([known[0], Metric(None)], [1, 1]).H is None


@pytest.mark.parametrize(("rank", "counts"), [(10, (4, 3, 3)), (2, (1, 1, 0)), (47, (16, 16, 15))])
def test_every_matrix_gives_as_many_rows(rank: int, counts: tuple[int, ...]) -> None:
    own = [Place("", n, 3).own(rank) for n in range(3)]
    assert [part.stop - part.start for part in own] == list(counts)
    assert own[0].start == 0 and own[-1].stop == rank
    matrices, known = weights(20), metrics()
    right, chosen = basis(matrices, known, rank, DOUBLE)
    assert [int(rows.sum()) for rows in chosen] == list(counts)
    plain = directions(matrices, known)[:rank]
    for W, H, rows, part in zip(matrices, known, chosen, own, strict=True):
        left = fitted(W, right, H)
        size = float(H.error(W).sum())
        rest = left @ right - fitted(W, plain, H) @ plain  # rows of the products say all that the directions say
        assert float(H.error(rest).sum()) < 1e-6 * size
        assert float(H.error(right[part] - (left @ right)[rows]).sum()) < 1e-6 * size  # and these are its own


def test_rows_are_taken_where_others_say_nothing() -> None:
    same = torch.eye(6, dtype=DOUBLE) * torch.arange(6, 0, -1)  # says most in its first rows
    first, second = spread([same, same], [3, 3])
    assert first.tolist() == [True] * 3 + [False] * 3
    assert second.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_are_as_promised_and_nothing_is_nearer(dtype: torch.dtype) -> None:
    matrices, known = [W.to(dtype) for W in weights(20)], [hessian(seed=seed) for seed in range(3)]
    plain = SvdLlm(SvdLlmConfig(keep=0.5, blocks=3))
    config, stacked = plain.config, (60, WIDTH)
    rank = config.rank_of(stacked)
    metric = [plain.metric(plain.prepare(statistic)) for statistic in known]
    right, chosen = basis([W.double() for W in matrices], metric, rank, dtype)
    numbers = 0
    for n, (W, H, statistic) in enumerate(zip(matrices, metric, known, strict=True)):
        place = Place("a", n, 3)
        promised = plain.at(place).form((20, WIDTH), dtype).weight
        method = plain.at(replace(place, right=right, pivots=chosen[n]))
        assert method.check((20, WIDTH)) is None and plain.place is None
        made = method.compress(W, method.prepare(statistic)).weight
        assert isinstance(made, LowRank) and isinstance(promised, LowRank)
        check_blocks(made)
        assert (made.shared, made.own) == (promised.shared, promised.own) == ("a", place.own(rank))
        assert isinstance(made.left, Dense) and isinstance(promised.left, Dense)
        assert made.left.weight.shape == promised.left.weight.shape
        numbers += made.left.weight.numel()
        best = W.double() - fitted(W.double(), right.double(), H) @ right.double()
        error = H.error(W.double() - decode(made).double()).sum() / H.error(W.double()).sum()
        assert float(error) <= 1.02 * float(H.error(best).sum() / H.error(W.double()).sum()) + 1e-4
    assert numbers + right.numel() == config.numbers(stacked, rank) <= 0.5 * 60 * WIDTH + 1


@pytest.mark.parametrize("settings", [{"bits": 2}, {"factor_bits": 8}, {"pivots": False}])
def test_what_is_not_shared_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="is not for `blocks`"):
        SvdLlmConfig(blocks=2, **settings)
    assert SvdLlmConfig(**settings).blocks == 1


def test_a_rank_is_that_of_all_together() -> None:
    method = SvdLlm(SvdLlmConfig(rank=30, blocks=3))
    assert "largest that does is 19" in str(method.check((20, WIDTH)))
    placed = method.at(Place("a", 0, 3))
    assert placed.check((20, WIDTH)) is None
    assert "largest that does is 11" in str(placed.check((4, WIDTH)))
