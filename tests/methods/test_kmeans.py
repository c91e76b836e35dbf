# ruff: noqa: N803, N806 - W and H are the papers' symbols
"""K-means with feedback against brute force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from correlated import WIDTH, hessian
from pydantic import ValidationError
from torch import Tensor

from llmshrink.forms import Codebook, Scattered, Sum, decode, shape_of
from llmshrink.methods.clusters import cost
from llmshrink.methods.codes import Codes, in_order, moved, refitted, rescaled, swept
from llmshrink.methods.hessian import Factors
from llmshrink.methods.kmeans import Kmeans, KmeansConfig
from llmshrink.statistics import Hessian, NoStatistic

KINDS = [
    {"bits": 1, "dim": 1, "scales": False},
    {"bits": 2, "dim": 1, "scales": True},
    {"bits": 4, "dim": 1, "scales": False},
    {"bits": 2, "dim": 2, "scales": True},
    {"bits": 1, "dim": 4, "scales": False},
]


def matrix(seed: int) -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(seed))


def factors(method: Kmeans) -> Factors:
    found = method.prepare(hessian())
    assert isinstance(found, Factors)
    return found


def damped(found: Factors) -> Tensor:
    return found.H.double() + found.damp * torch.eye(WIDTH, dtype=torch.float64)


def objective(W: Tensor, codes: Codes, H: Tensor) -> Tensor:
    rest = W.double() - codes.weight().double()
    return ((rest @ H) * rest).sum(1)


def begin(kind: dict[str, Any]) -> tuple[Tensor, Factors, Codes]:
    """A matrix whose rows differ in size, what its inputs weigh, and tables for four rows each."""
    method = Kmeans(KmeansConfig(rows=4, **kind))
    found, W = factors(method), matrix(3) * torch.arange(1, 17)[:, None]
    return W, found, method._nearest(W, method.config.sharing((16, WIDTH), torch.float32), found.importance)


def entries(found: Codes) -> Tensor:
    """What each code of each row could mean, float64 [out, count, dim]."""
    return (found.table.repeat_interleave(4, 0) * found.scale[..., None]).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ahead", [0, 1 << 22])
def test_codes_are_those_of_brute_force(kind: dict[str, Any], ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmshrink.methods.codes.AHEAD", ahead)
    W, found, first = begin(kind)
    codes = swept(W, first, found).codes
    H, rest, meant = damped(found), W.double().clone(), entries(first)
    order, dim = found.order.tolist(), first.table.shape[2]
    for position in range(0, WIDTH, dim):
        free, own = order[position:], order[position : position + dim]
        assert own == list(range(own[0], own[0] + dim))  # a vector stays together
        inverse = torch.linalg.inv(H[free][:, free])
        cost_of = torch.linalg.inv(inverse[:dim, :dim])  # once the inputs after it have made up for it
        error = rest[:, None, own] - meant
        code = torch.einsum("rki,ij,rkj->rk", error, cost_of, error).argmin(1)
        assert torch.equal(codes[:, own[0] // dim], code)
        rest[:, free] -= error[torch.arange(16), code] @ cost_of @ inverse[:dim]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_least_squares(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmshrink.methods.codes.STEPS", 80)
    W, found, first = begin(kind)
    fitted, H = refitted(W, first, found, torch.float32), damped(found)
    groups, count, dim = first.table.shape
    for group in range(groups):
        part = slice(4 * group, 4 * group + 4)
        spread = torch.zeros(4, WIDTH, count, dim, dtype=torch.float64)
        for column in range(WIDTH):
            spread[torch.arange(4), column, first.codes[part, column // dim], column % dim] = 1
        spread = (spread * first.scale[part].double()[:, :, None, None]).flatten(2)
        normal = torch.einsum("rik,ij,rjl->kl", spread, H, spread)
        right = torch.einsum("rik,ij,rj->k", spread, H, W[part].double())
        exact = torch.linalg.lstsq(normal, right[:, None]).solution.view(count, dim)
        exact = exact.sort(0).values if dim == 1 else exact
        assert torch.allclose(fitted.table[group].double(), exact, atol=2e-3 * float(exact.abs().max()))


def test_scales_are_those_of_least_squares() -> None:
    W, found, first = begin({"bits": 2, "dim": 1, "scales": True})
    fitted, H, units = rescaled(W, first, found, torch.float32), damped(found), first.units().double()
    for row in range(16):
        exact = (units[row] @ H @ W[row].double()) / (units[row] @ H @ units[row])
        assert float(fitted.scale[row]) == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_no_move_makes_it_worse_and_none_is_left(kind: dict[str, Any]) -> None:
    W, found, codes = begin(kind)
    H = damped(found)
    values = [objective(W, codes, H)]
    for _ in range(40):
        codes = moved(W, codes, found)
        values.append(objective(W, codes, H))
    for before, after in zip(values, values[1:], strict=False):
        assert bool((after <= before * (1 + 1e-5)).all())
    meant, dim = entries(codes), codes.table.shape[2]
    for column in range(0, WIDTH, 2 * dim):  # at the end no other entry of a table would be better for any code
        for value in range(meant.shape[1]):
            other = codes.weight().double()
            other[:, column : column + dim] = meant[:, value]
            rest = W.double() - other
            assert bool((((rest @ H) * rest).sum(1) >= values[-1] * (1 - 1e-5)).all())


def test_values_that_passed_each_other_are_put_in_order() -> None:
    _, _, found = begin({"bits": 2, "dim": 1, "scales": True})
    turned = Codes(found.table.flip(1), found.scale, 3 - found.codes)
    assert torch.equal(turned.weight(), found.weight()) and torch.equal(in_order(turned).codes, found.codes)


def test_each_step_is_worth_it() -> None:
    W, H = matrix(5), hessian().matrix.double()

    def error(**settings: object) -> float:
        method = Kmeans(KmeansConfig.model_validate({"bits": 3, "dim": 1, "rows": 4, **settings}))
        statistic = hessian() if method.statistic is Hessian else NoStatistic(WIDTH, torch.device("cpu"))
        form = method.compress(W, method.prepare(statistic)).weight
        rest = W.double() - decode(form).double()
        return float(((rest @ H) * rest).sum())

    plain = error(weighting="none", feedback=False)
    weighed = error(feedback=False)
    fed = error(refine=0)
    assert error() < fed < min(weighed, plain)


def test_without_text_it_is_the_best_of_the_weights() -> None:
    W = matrix(6)
    method = Kmeans(KmeansConfig(bits=3, dim=1, scales=False, rows=8, weighting="none"))
    form = method.compress(W, method.prepare(method.statistic(WIDTH, torch.device("cpu")))).weight
    assert isinstance(form, Codebook)
    groups = W.reshape(len(form.table), -1)
    own = (W - decode(form)).double().square().view(len(form.table), -1).sum(1)
    assert torch.allclose(own, cost(groups, None, form.table[..., 0].float()), rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "shape", "right"),
    [
        ({"bits": 4, "scales": False}, (768, 256), (1, 8, False)),
        ({"bits": 3, "scales": False}, (256, 768), (1, 1, False)),
        ({"bits": 2, "scales": False}, (64, 64), (1, 4, False)),
        ({"bits": 8}, (1024, 4096), (1, 512, True)),
        ({"bits": 4}, (1024, 4096), (2, 512, True)),
        ({"bits": 3}, (64, 512), (2, 64, True)),
        ({"bits": 3}, (64, 256), (1, 64, True)),
        ({"bits": 2}, (4096, 1024), (4, 2048, True)),
        ({"bits": 2}, (64, 64), (1, 64, True)),
        ({"bits": 4}, (64, 32), (1, 64, False)),
        ({"bits": 8}, (8209, 512), (1, 8209, True)),  # a prime: a table for each row would take more than it saves
    ],
)
def test_rows_share_tables_as_far_as_it_pays(
    settings: dict[str, Any], shape: tuple[int, int], right: tuple[int, int, bool]
) -> None:
    found = KmeansConfig(**settings).sharing(shape, torch.bfloat16)
    assert (found.dim, found.rows, found.scaled) == right


def test_what_cannot_be_is_refused() -> None:
    assert "does not divide its 24" in str(Kmeans(KmeansConfig(rows=5)).check((24, 64)))
    with pytest.raises(ValidationError, match="or a positive number"):
        KmeansConfig(rows=0)
    assert "does not divide its 66" in str(Kmeans(KmeansConfig(dim=4, bits=2)).check((24, 66)))
    assert "256 values would stand for 128 weights" in str(Kmeans(KmeansConfig(bits=8, rows=2)).check((24, 64)))
    assert Kmeans(KmeansConfig(rows=-1)).check((24, 64)) is None
    with pytest.raises(ValidationError, match="with dim 2, bits is 4"):
        KmeansConfig(bits=5, dim=2)


def test_outliers_make_no_error_and_others_make_up_for_less() -> None:
    W = matrix(8)
    W[torch.arange(16), torch.arange(16)] = 12.0  # one in each row that is far out
    method = Kmeans(KmeansConfig(bits=2, rows=8, outliers=1 / WIDTH))
    found, H = method.prepare(hessian()), hessian().matrix.double()
    form = method.compress(W, found).weight
    assert isinstance(form, Sum)
    book, apart = form.parts
    assert isinstance(apart, Scattered) and torch.equal(apart.columns.long(), torch.arange(16))
    assert apart.counts.tolist() == [1] * 16 and method.form((16, WIDTH), torch.float32).weight.parts[
        1
    ].values.shape == (16,)
    rest = (W - decode(form)).double()
    without = Kmeans(KmeansConfig(bits=2, dim=1, rows=8))
    other = (W - decode(without.compress(W, without.prepare(hessian())).weight)).double()
    assert float(((rest @ H) * rest).sum()) < 0.6 * float(((other @ H) * other).sum())
    with pytest.raises(ValidationError, match="leave out `dim`"):
        KmeansConfig(outliers=0.01, dim=2, bits=2)


def test_every_stretch_has_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmshrink.methods.kmeans.STRETCH", 6 * WIDTH)
    method = Kmeans(KmeansConfig(bits=1, rows=2, outliers=1e-5))
    form = method.compress(matrix(3)[:14], method.prepare(hessian())).weight  # the last stretch has two rows
    planned = method.form((14, WIDTH), torch.float32).weight
    assert shape_of(form) == shape_of(planned) == (14, WIDTH)
    assert isinstance(form, Sum) and isinstance(planned, Sum) and isinstance(planned.parts[1], Scattered)
    assert len(form.parts[1].values) == len(planned.parts[1].values) == 3


def test_an_outlier_that_no_table_could_hold_is_in_none() -> None:
    W = matrix(3)
    W[3, 5] = 1e12
    method = Kmeans(KmeansConfig(bits=2, scales=True, rows=-1, outliers=0.01, weighting="none"))
    form = method.compress(W, method.prepare(NoStatistic(WIDTH, torch.device("cpu")))).weight
    assert isinstance(form, Sum) and isinstance(form.parts[0], Codebook)
    assert bool(form.parts[0].table.isfinite().all()) and float(form.parts[0].table.abs().max()) < 100


def test_a_row_of_zeros_takes_nothing_from_the_others() -> None:
    W = 0.02 * matrix(3)
    W[3] = 0
    method = Kmeans(KmeansConfig(bits=2, dim=1, scales=True, rows=-1))
    without = W[[row for row in range(16) if row != 3]]
    own, other = (decode(method.compress(part, method.prepare(hessian())).weight) for part in (W, without))
    assert float((own - W).norm()) < 1.02 * float((other - without).norm())


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_rows_far_from_one_keep_their_size(size: float) -> None:
    W = matrix(3)
    W[3] *= size
    method = Kmeans(KmeansConfig(bits=4, dim=1, scales=True, rows=-1, weighting="none"))
    form = decode(method.compress(W, method.prepare(NoStatistic(WIDTH, torch.device("cpu")))).weight)
    assert float(((form[3] - W[3]) / size).norm() / (W[3] / size).norm()) < 0.2


def test_free_weights_are_swept_and_moved_as_brute_force_does() -> None:
    W, found, first = begin({"bits": 2, "dim": 1, "scales": True})
    free = torch.rand(W.shape, generator=torch.Generator().manual_seed(9)) < 0.1
    codes = swept(W, replace(first, free=free), found)
    H, rest, meant = damped(found), W.double().clone(), entries(first)[..., 0]
    order = found.order.tolist()
    for position, column in enumerate(order):
        inverse = torch.linalg.inv(H[order[position:]][:, order[position:]])
        code = (rest[:, column, None] - meant).abs().argmin(1)
        error = rest[:, column] - meant.gather(1, code[:, None])[:, 0]
        stored = torch.where(free[:, column], error.bfloat16().double(), 0)
        assert torch.allclose(codes.apart[:, column].double(), stored, rtol=2**-7, atol=1e-4)
        error -= codes.apart[:, column].double()
        rest[:, order[position:]] -= error[:, None] * inverse[0] / inverse[0, 0]
    before = objective(W, codes, H)
    after = objective(W, moved(W, codes, found), H)
    assert bool((after <= before * (1 + 1e-4)).all()) and float(after.sum()) < 0.95 * float(before.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_stay_so(kind: dict[str, Any]) -> None:
    W, method = matrix(4), Kmeans(KmeansConfig(rows=4, **kind))
    W[2:6] = 0
    for one in (method, method.alone):
        statistic = hessian() if one is method else NoStatistic(WIDTH, torch.device("cpu"))
        weight = decode(one.compress(W, one.prepare(statistic)).weight)
        assert not weight[2:6].any() and weight[0].any()


def test_long_matrices_are_taken_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    W = matrix(7)
    method = Kmeans(KmeansConfig(bits=3, rows=4))
    prepared = method.prepare(hessian())
    whole = method.compress(W, prepared)
    monkeypatch.setattr("llmshrink.methods.kmeans.STRETCH", 8 * WIDTH)
    parts = method.compress(W, prepared)
    assert (decode(parts.weight) == decode(whole.weight)).float().mean() > 0.99  # sums in another order
    assert parts.objective is not None and len(parts.objective.own) == len(W)
