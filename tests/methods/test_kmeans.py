# ruff: noqa: N803, N806 - W and H are the papers' symbols
"""K-means with feedback against brute force."""

from __future__ import annotations

import pytest
import torch
from correlated import WIDTH, hessian
from torch import Tensor

from llmshrink.forms import Codebook, decode
from llmshrink.methods.clusters import cost
from llmshrink.methods.hessian import Factors
from llmshrink.methods.kmeans import Kmeans, KmeansConfig, _Codes, _moved, _refitted, _swept
from llmshrink.statistics import Hessian, NoStatistic


def matrix(seed: int) -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(seed))


def factors(method: Kmeans) -> Factors:
    found = method.prepare(hessian())
    assert isinstance(found, Factors)
    return found


def damped(found: Factors) -> Tensor:
    return found.H.double() + found.damp * torch.eye(WIDTH, dtype=torch.float64)


def objective(W: Tensor, codes: _Codes, H: Tensor) -> Tensor:
    rest = W.double() - codes.weight().double()
    return ((rest @ H) * rest).sum(1)


def start(method: Kmeans, found: Factors) -> tuple[Tensor, _Codes]:
    W = matrix(3)
    return W, method._nearest(W, 4, found.importance, torch.float32)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_are_those_of_brute_force(bits: int) -> None:
    method = Kmeans(KmeansConfig(bits=bits, rows=4))
    found = factors(method)
    W, first = start(method, found)
    swept = _swept(W, first.table, found)

    H, rest = damped(found), W.double().clone()
    table = first.table.double().repeat_interleave(4, 0)
    order = found.order.tolist()
    for position, column in enumerate(order):
        free = order[position:]
        inverse = torch.linalg.inv(H[free][:, free])
        code = (rest[:, column, None] - table).abs().argmin(1)
        assert torch.equal(swept.codes[:, column], code)
        error = rest[:, column] - table.gather(1, code[:, None])[:, 0]
        rest[:, free] -= error[:, None] * inverse[0] / inverse[0, 0]


def test_tables_are_those_of_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmshrink.methods.kmeans.STEPS", 60)
    method = Kmeans(KmeansConfig(bits=2, rows=4))
    found = factors(method)
    W, first = start(method, found)
    fitted = _refitted(W, first, found, torch.float32)
    H = damped(found)
    for group in range(len(first.table)):
        part = slice(4 * group, 4 * group + 4)
        spread = torch.nn.functional.one_hot(first.codes[part], 4).double()  # [rows, in, values]
        normal = torch.einsum("rik,ij,rjl->kl", spread, H, spread)
        right = torch.einsum("rik,ij,rj->k", spread, H, W[part].double())
        exact = torch.linalg.lstsq(normal, right[:, None]).solution[:, 0]
        assert torch.allclose(fitted.table[group].double(), exact.sort().values, atol=1e-3)


def test_no_move_makes_it_worse_and_none_is_left() -> None:
    method = Kmeans(KmeansConfig(bits=2, rows=4))
    found = factors(method)
    W, codes = start(method, found)
    H = damped(found)
    values = [objective(W, codes, H)]
    for _ in range(40):
        codes = _moved(W, codes, found)
        values.append(objective(W, codes, H))
    for before, after in zip(values, values[1:], strict=False):
        assert bool((after <= before * (1 + 1e-5)).all())
    table = codes.table.repeat_interleave(4, 0)
    for column in range(0, WIDTH, 7):  # at the end no other value of a table would be better for any code
        for value in range(4):
            other = codes.weight().clone()
            other[:, column] = table[:, value]
            rest = W.double() - other.double()
            assert bool((((rest @ H) * rest).sum(1) >= values[-1] * (1 - 1e-5)).all())


def test_each_step_is_worth_it() -> None:
    W, H = matrix(5), hessian().matrix.double()

    def error(**settings: object) -> float:
        method = Kmeans(KmeansConfig.model_validate({"bits": 3, "rows": 4, **settings}))
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
    method = Kmeans(KmeansConfig(bits=3, rows=8, weighting="none"))
    form = method.compress(W, method.prepare(method.statistic(WIDTH, torch.device("cpu")))).weight
    assert isinstance(form, Codebook)
    groups = W.reshape(len(form.table), -1)
    own = (W - decode(form)).double().square().view(len(form.table), -1).sum(1)
    assert torch.allclose(own, cost(groups, None, form.table.float()), rtol=1e-4)


@pytest.mark.parametrize(
    ("bits", "shape", "rows"), [(4, (768, 256), 8), (3, (256, 768), 1), (2, (64, 64), 4), (8, (1024, 4096), 8)]
)
def test_as_few_rows_share_as_keep_the_tables_small(bits: int, shape: tuple[int, int], rows: int) -> None:
    assert KmeansConfig(bits=bits).shared(shape) == rows


def test_what_cannot_be_is_refused() -> None:
    assert "does not divide" in str(Kmeans(KmeansConfig(rows=5)).check((24, 64)))
    assert "256 values would stand for 128 weights" in str(Kmeans(KmeansConfig(bits=8, rows=2)).check((24, 64)))
    assert Kmeans(KmeansConfig(rows=-1)).check((24, 64)) is None


def test_long_matrices_are_taken_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    W = matrix(7)
    method = Kmeans(KmeansConfig(bits=3, rows=4))
    prepared = method.prepare(hessian())
    whole = method.compress(W, prepared)
    monkeypatch.setattr("llmshrink.methods.kmeans.STRETCH", 8 * WIDTH)
    parts = method.compress(W, prepared)
    assert (decode(parts.weight) == decode(whole.weight)).float().mean() > 0.99  # sums in another order
    assert parts.objective is not None and len(parts.objective.own) == len(W)
