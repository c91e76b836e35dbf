# ruff: noqa: N803, N806 - H is the papers' symbol
"""GPTQ against brute force, and what it does when the Hessian is not what it should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from correlated import WIDTH, hessian, matrix
from oracles import coordinate_descent, optimal_brain_quantizer
from torch import Tensor

from llmshrink.block_types import BLOCK_TYPES
from llmshrink.forms import Quantized, decode
from llmshrink.methods import hessian as hessian_of
from llmshrink.methods.gptq import Factors, Gptq, GptqConfig
from llmshrink.methods.grid import Grid, choose_grid, round_to
from llmshrink.methods.rtn import Rtn, RtnConfig
from llmshrink.statistics import Cross, Hessian


def objective(weight: Tensor, form: Quantized, H: Tensor) -> Tensor:
    rest = weight.double() - decode(form).double()
    return ((rest @ H.double()) * rest).sum(1)


def prepared(method: Gptq, statistic: Hessian) -> Factors:
    factors = method.prepare(statistic)
    assert isinstance(factors, Factors)
    return factors


@pytest.fixture(params=[(16, 256), (5, 20), (1, 7), (64, 17)])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of a leaf and rows of a panel: they may change the speed alone."""
    leaf, panel = request.param
    monkeypatch.setattr(hessian_of, "LEAF", leaf)
    monkeypatch.setattr(hessian_of, "PANEL", panel)


@pytest.mark.parametrize("double_width", [0, 4096])
@pytest.mark.parametrize("width", [5, 256, 300, 600])
def test_factors_are_those_of_the_inverse(width: int, double_width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_of, "DOUBLE_WIDTH", double_width)
    statistic = hessian(width, tokens=4 * width)
    factors = prepared(Gptq(GptqConfig(group_size=-1)), statistic)
    H = statistic.matrix.double()
    H.diagonal().add_(factors.damp)
    inverse = torch.linalg.inv(H)
    close = {"rtol": 1e-4, "atol": 1e-5} if double_width else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(factors.importance.double(), 1 / inverse.diagonal(), **close)
    upper = torch.linalg.cholesky(inverse[factors.order][:, factors.order], upper=True)
    torch.testing.assert_close(factors.spread.double().triu(), upper / upper.diagonal()[:, None], **close)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_equal_those_of_brute_force(bits: int, act_order: bool, symmetric: bool) -> None:
    config = GptqConfig(bits=bits, group_size=16, act_order=act_order, symmetric=symmetric)
    method, statistic, weight = Gptq(config), hessian(), matrix()
    factors = prepared(method, statistic)
    grid = choose_grid(weight, config, torch.float32, factors.importance)
    found = grid.form(method._sweep(weight, grid, factors), config).codes

    H = statistic.matrix.double()
    H.diagonal().add_(config.damp * H.diagonal().mean())
    order = H.diagonal().argsort(descending=True).tolist() if act_order else list(range(WIDTH))
    zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
    scales, zeros = (t.repeat_interleave(16, 1) for t in (grid.scale, zero))
    assert torch.equal(found.double(), optimal_brain_quantizer(weight, H, order, scales, zeros, config.code_range))


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("group", [16, 48, -1, 8])
@pytest.mark.parametrize("bits", [2, 3])
def test_refinement_equals_brute_force(bits: int, group: int) -> None:
    config = GptqConfig(bits=bits, group_size=group)
    method, statistic, weight = Gptq(config), hessian(), matrix(6)
    factors = prepared(method, statistic)
    start = choose_grid(weight, config, torch.float32)
    steps = round_to(start, weight, config)
    grid, moved = method._refine(weight, start, steps, factors)

    H = statistic.matrix + factors.damp * torch.eye(WIDTH)
    scale, codes = coordinate_descent(weight, H, start.scale, steps, config.group(WIDTH), config.code_range)
    assert torch.equal(moved.double(), codes)
    torch.testing.assert_close(grid.scale.double(), scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_refinement_never_makes_the_objective_larger(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    config = GptqConfig(bits=bits, group_size=8, symmetric=symmetric)
    method, weight = Gptq(config), matrix()
    factors = prepared(method, hessian())
    H = factors.H + factors.damp * torch.eye(WIDTH)
    grid = choose_grid(weight, config, dtype, factors.importance)
    steps = method._sweep(weight, grid, factors)
    errors = [objective(weight, grid.form(steps, config), H)]
    for _ in range(3):
        grid, steps = method._refine(weight, grid, steps, factors)
        errors.append(objective(weight, grid.form(steps, config), H))
        assert (errors[-1] <= errors[-2] * (1 + 1e-5)).all()
    if bits < 8:
        assert errors[-1].sum() < 0.98 * errors[0].sum()


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_row_is_worse_than_rounding_to_nearest(bits: int, group: int) -> None:
    statistic, weight = hessian(tokens=20), matrix(60).bfloat16()
    method = Gptq(GptqConfig(bits=bits, group_size=group, refine=0))
    factors = prepared(method, statistic)
    layer = method.compress(weight, factors)
    grid = choose_grid(weight.float(), method.config, weight.dtype, factors.importance)
    nearest = grid.form(round_to(grid, weight.float(), method.config), method.config)
    rtn = Rtn(RtnConfig(bits=bits, group_size=group))
    plain = rtn.compress(weight, rtn.prepare(statistic)).weight
    assert isinstance(layer.weight, Quantized) and isinstance(plain, Quantized) and layer.objective is not None
    mine, theirs = objective(weight, layer.weight, statistic.matrix), objective(weight, nearest, statistic.matrix)
    assert (mine <= theirs * (1 + 1e-4)).all()
    assert layer.objective.share == pytest.approx(float(mine.sum() / theirs.sum()), rel=1e-3)
    assert mine.sum() < 0.8 * objective(weight, plain, statistic.matrix).sum()


def test_rows_are_chosen_by_their_own_error() -> None:
    weight, H = torch.zeros(2, 4), torch.eye(4)
    tables = [Grid(torch.full((2, 1), s), None) for s in (1.0, 2.0)]
    steps = [torch.tensor([[1.0] * 4, [0.0] * 4]), torch.tensor([[0.0] * 4, [1.0] * 4])]
    layer = Gptq(GptqConfig(group_size=4))._better_rows(weight, (tables[0], steps[0]), (tables[1], steps[1]), H)
    assert isinstance(layer.weight, Quantized)
    assert layer.weight.codes.sum() == 0
    assert decode(layer.weight.scale).flatten().tolist() == [2.0, 1.0]
    assert layer.objective is not None and layer.objective.share == 0.0


def test_inputs_that_are_always_zero_are_rounded_to_nearest_and_told() -> None:
    dead = (3, 17, 40)
    method, weight = Gptq(GptqConfig(bits=3, group_size=16)), matrix()
    factors = prepared(method, hessian(dead=dead))
    assert [(e.kind, e.data) for e in factors.events] == [("dead_columns", {"columns": 3.0})]
    form = method.compress(weight, factors).weight
    assert isinstance(form, Quantized)
    scale = decode(form.scale).repeat_interleave(16, 1)
    nearest = (weight / scale).round().clamp(-4, 3)
    assert torch.equal(form.codes[:, dead].float(), nearest[:, dead])


def test_damping_is_raised_step_by_step_until_the_factorisation_holds() -> None:
    statistic, method = hessian(), Gptq(GptqConfig(bits=4, group_size=16))
    mean = statistic.matrix.diagonal().mean()
    values, vectors = torch.linalg.eigh(statistic.matrix)
    statistic.matrix -= (values[0] + 0.05 * mean) * torch.outer(vectors[:, 0], vectors[:, 0])  # least one: -5 % of mean
    factors = prepared(method, statistic)
    assert [e.kind for e in factors.events] == ["damping"]
    assert factors.events[0].data == {"damp": pytest.approx(0.1)}
    assert decode(method.compress(matrix(), factors).weight).isfinite().all()


@pytest.mark.parametrize("fault", ["no tokens", "nan", "infinite", "indefinite"])
def test_an_unusable_hessian_falls_back_to_rounding_with_an_event(fault: str) -> None:
    statistic = hessian()
    if fault == "no tokens":
        statistic = Hessian(WIDTH, torch.device("cpu"))
        statistic.finish()
    elif fault == "indefinite":
        statistic.matrix[0, 1:] *= 1000
        statistic.matrix[1:, 0] *= 1000
    else:
        statistic.matrix[2, 5] = float("nan" if fault == "nan" else "inf")
    method, weight = Gptq(GptqConfig(bits=4, group_size=16)), matrix()
    factors = method.prepare(statistic)
    assert [e.kind for e in factors.events] == ["rtn_fallback"]
    rtn = Rtn(RtnConfig(bits=4, group_size=16))
    plain = rtn.compress(weight, rtn.prepare(statistic))
    assert torch.equal(decode(method.compress(weight, factors).weight), decode(plain.weight))


def rank_one(x: Tensor) -> Tensor:
    return x[:1].T @ x[:1]


def with_negative_eigenvalues(x: Tensor) -> Tensor:
    """As sums in half precision give them: the least one a thousandth of the mean below zero."""
    H = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(H)
    return H - (values[0] + 1e-3 * values.mean()) * torch.outer(vectors[:, 0], vectors[:, 0])


def with_an_outlier(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 7] *= 1e4
    return x.T @ x / len(x)


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "rank one": rank_one,
    "zero": lambda x: torch.zeros(WIDTH, WIDTH),
    "negative eigenvalues": with_negative_eigenvalues,
    "outlier": with_an_outlier,
    "tiny": lambda x: 1e-30 * x.T @ x,
    "huge": lambda x: 1e30 * x.T @ x,
}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_hessian_gives_a_finite_result_no_worse_than_rounding(kind: str, bits: int) -> None:
    statistic, weight = hessian(), matrix()
    x = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(3))
    statistic.matrix = STRANGE[kind](x)
    method, rtn = Gptq(GptqConfig(bits=bits, group_size=16)), Rtn(RtnConfig(bits=bits, group_size=16))
    found = method.prepare(statistic)
    layer, plain = method.compress(weight, found), rtn.compress(weight, rtn.prepare(statistic))
    assert decode(layer.weight).isfinite().all()
    assert isinstance(layer.weight, Quantized) and isinstance(plain.weight, Quantized)
    mine, theirs = (objective(weight, form, statistic.matrix).sum() for form in (layer.weight, plain.weight))
    assert mine <= theirs.abs() * (1 + 1e-4)
    told = {"zero": ["dead_columns"]}.get(kind, [])
    assert [event.kind for event in found.events] == told


def test_all_inputs_zero_is_rounding_to_nearest() -> None:
    statistic = hessian(dead=tuple(range(WIDTH)))
    method, weight = Gptq(GptqConfig(bits=4, group_size=16)), matrix()
    form = method.compress(weight, method.prepare(statistic)).weight
    assert (decode(form) - weight).abs().max() < 0.02


def test_activation_order_pays_where_a_few_inputs_dominate() -> None:
    statistic, weight = hessian(), matrix(64)
    scale = torch.ones(WIDTH)
    scale[-4:] = 10
    statistic.matrix *= scale[:, None] * scale
    errors = []
    for act_order in (True, False):
        method = Gptq(GptqConfig(bits=3, group_size=16, act_order=act_order, refine=0))
        form = method.compress(weight, method.prepare(statistic)).weight
        assert isinstance(form, Quantized)
        errors.append(objective(weight, form, statistic.matrix).sum())
    assert errors[0] < errors[1]


BLOCK_WIDTH = 256
SWEPT = ("Q2_K", "Q4_K", "Q6_K", "Q4_0", "Q5_1", "Q8_0", "TQ2_0")  # one of each kind; all in the slow tests


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SWEPT else pytest.mark.slow) for n in BLOCK_TYPES])
def test_block_types_are_swept_as_brute_force_does(name: str) -> None:
    config = GptqConfig(type=name)
    method, statistic, weight = Gptq(config), hessian(BLOCK_WIDTH, tokens=400), matrix(3, BLOCK_WIDTH)
    factors = prepared(method, statistic)
    grid = choose_grid(weight, config, torch.float16, factors.importance)
    found = method._sweep(weight, grid, factors)
    scale, minimum, low, high = (t.repeat_interleave(config.group(BLOCK_WIDTH), 1) for t in grid.tables(config))
    H = statistic.matrix.double()
    H.diagonal().add_(config.damp * H.diagonal().mean())
    order = H.diagonal().argsort(descending=True).tolist()
    exact = optimal_brain_quantizer(weight + minimum, H, order, scale, torch.zeros_like(scale), config.code_range)
    assert (found.double() == exact.clamp(low, high)).float().mean() > 0.999  # of 8 bits one code may round otherwise


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_refining_block_types_never_makes_the_objective_larger(name: str) -> None:
    config = GptqConfig(type=name)
    method, weight = Gptq(config), matrix(12, BLOCK_WIDTH)
    weight[0, : config.group(BLOCK_WIDTH)] *= 1e-5  # in the k-quants a scale of zero
    factors = prepared(method, hessian(BLOCK_WIDTH, tokens=400))
    H = factors.H + factors.damp * torch.eye(BLOCK_WIDTH)
    grid = choose_grid(weight, config, torch.float16, factors.importance)
    steps = method._sweep(weight, grid, factors)
    errors = [objective(weight, grid.form(steps, config), H)]
    for _ in range(3):
        grid, steps = method._refine(weight, grid, steps, factors)
        assert torch.equal(decode(grid.form(steps, config)), grid.decode(steps))  # it can be stored
        errors.append(objective(weight, grid.form(steps, config), H))
        assert (errors[-1] <= errors[-2] * (1 + 1e-5)).all()
    if name != "Q8_0":
        assert errors[-1].sum() < 0.99 * errors[0].sum()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_no_row_of_a_block_type_is_worse_than_rounding_to_nearest(name: str) -> None:
    statistic, weight = hessian(BLOCK_WIDTH, tokens=100), matrix(40, BLOCK_WIDTH).bfloat16()
    method = Gptq(GptqConfig(type=name))
    layer = method.compress(weight, prepared(method, statistic))
    rtn = Rtn(RtnConfig(type=name))
    plain = rtn.compress(weight, rtn.prepare(statistic)).weight
    assert isinstance(layer.weight, Quantized) and isinstance(plain, Quantized) and layer.objective is not None
    assert (layer.objective.own <= layer.objective.baseline).all()
    mine = objective(weight, layer.weight, statistic.matrix)
    torch.testing.assert_close(layer.objective.own, mine.float(), rtol=1e-2, atol=1e-6)
    assert mine.sum() < 0.8 * objective(weight, plain, statistic.matrix).sum()


# --- what compressed blocks before it did to the inputs


def pairs(seed: int = 0) -> tuple[Tensor, Tensor, Cross]:
    """Inputs, what the original's layer gets for the same tokens, and the statistic of both."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(400, WIDTH, generator=random) @ torch.randn(WIDTH, WIDTH, generator=random)
    y = x + 0.3 * torch.randn(400, WIDTH, generator=random) + 0.1 * x.roll(1, 1)
    statistic = Cross(WIDTH, torch.device("cpu"))
    statistic.pair(x, y)
    statistic.finish()
    return x.double(), y.double(), statistic


def test_the_target_is_the_damped_least_squares_solution() -> None:
    x, y, statistic = pairs()
    factors = prepared(Gptq(GptqConfig(group_size=16, propagate=1.0)), statistic)
    assert factors.shift is not None
    W = matrix().double()
    # Rows added to both sides: damping pulls the solution towards W.
    pull = (len(x) * factors.damp) ** 0.5 * torch.eye(WIDTH, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([y @ W.T, pull @ W.T])).solution.T
    torch.testing.assert_close(W + W @ factors.shift.double(), best, rtol=1e-3, atol=1e-5)
    half = prepared(Gptq(GptqConfig(group_size=16, propagate=0.5)), statistic).shift
    assert half is not None
    torch.testing.assert_close(2 * half, factors.shift)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_come_nearer_to_the_original_s(bits: int) -> None:
    x, y, statistic = pairs()
    W, errors = matrix(), []
    for share in (0.0, 0.5, 1.0):
        method = Gptq(GptqConfig(bits=bits, group_size=16, propagate=share))
        assert method.statistic is (Cross if share else Hessian)
        form = method.compress(W, method.prepare(statistic)).weight
        errors.append(float((x @ decode(form).double().T - y @ W.double().T).square().sum()))
    assert errors[0] > errors[1] > errors[2]


def test_equal_inputs_shift_nothing() -> None:
    statistic = Cross(WIDTH, torch.device("cpu"))
    x = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(3))
    statistic.pair(x, x)
    statistic.finish()
    plain, shifted = (
        method.compress(matrix(), method.prepare(statistic)).weight
        for method in (Gptq(GptqConfig(group_size=16, propagate=share)) for share in (0.0, 1.0))
    )
    assert isinstance(plain, Quantized) and isinstance(shifted, Quantized)
    assert torch.equal(plain.codes, shifted.codes)


def test_a_hessian_that_cannot_be_solved_with_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    statistic = pairs()[2]
    exact = torch.linalg.cholesky_ex
    asked: list[int] = []

    def failing(A: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(A))
        factor, info = exact(A)
        return factor, torch.ones_like(info) if len(asked) == 2 else info  # the first is the sweep's own

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    found = prepared(Gptq(GptqConfig(group_size=16, propagate=1.0)), statistic)
    assert not hasattr(found, "shift") and [event.kind for event in found.events] == ["not_propagated"]
