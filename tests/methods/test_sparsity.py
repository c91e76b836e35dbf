# ruff: noqa: N803, N806 - H is the papers' symbol
"""Pruning of single weights against brute force: which go, how many, and what the others become."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from correlated import OUT, WIDTH, hessian, matrix
from oracles import least_squares, optimal_brain_surgeon
from pydantic import ValidationError
from torch import Tensor

from llmshrink.forms import Quantized, Sparse, decode
from llmshrink.methods import load_method, sparsegpt
from llmshrink.methods.base import Method
from llmshrink.methods.gptq import Gptq, GptqConfig
from llmshrink.methods.sparsegpt import SparseGpt, SparseGptConfig
from llmshrink.methods.sparsity import PRUNED, RowConfig, highest, keep_highest, output_error, refit, zeros_kept
from llmshrink.statistics import Hessian, Norm, NoStatistic, Statistic

NAMES = ("magnitude", "random", "wanda", "sparsegpt")


def make(name: str, **settings: Any) -> Method[Any]:
    method = load_method(name)
    return method(method.Config(**settings))


def pruned(method: Method[Any], weight: Tensor, statistic: Statistic | None = None) -> Sparse:
    kinds: dict[type[Statistic], Statistic] = {NoStatistic: NoStatistic(WIDTH, torch.device("cpu"))}
    form = method.compress(weight, method.prepare(statistic or kinds.get(method.statistic) or hessian())).weight
    assert isinstance(form, Sparse)
    return form


def test_zeros_among_codes_were_not_pruned() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    half = torch.where(weight.abs() > 0.6, weight, 0.0)
    rounded = (weight / 0.2).round().clamp(-8, 7) * 0.2
    assert float((rounded == 0).float().mean()) > PRUNED
    assert zeros_kept(rounded, "auto") is None and zeros_kept(weight, "auto") is None
    for keep, given in (("auto", half), (True, half), (True, rounded)):
        kept = zeros_kept(given, keep)  # type: ignore[arg-type]
        assert kept is not None and torch.equal(kept, given != 0)
        assert zeros_kept(given.bfloat16(), keep) is not None  # type: ignore[arg-type]
    assert zeros_kept(half, keep=False) is None and zeros_kept(weight, keep=True) is None


def norm_of(statistic: Hessian) -> Norm:
    norm = Norm(len(statistic.matrix), torch.device("cpu"))
    norm.tokens, norm.square = statistic.tokens, statistic.matrix.diagonal().clone()
    return norm


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("name", NAMES)
def test_exactly_as_many_go_as_are_asked_for(name: str, share: float) -> None:
    method = make(name, sparsity=share)
    form = pruned(method, matrix(), norm_of(hessian()) if name == "wanda" else None)
    promised = method.form((OUT, WIDTH), torch.float32).weight
    assert isinstance(promised, Sparse)
    assert form.kept == promised.kept == int(form.mask.sum())
    per_row = name in ("wanda", "random")
    assert OUT * WIDTH - form.kept == (OUT * round(share * WIDTH) if per_row else round(share * OUT * WIDTH))
    if per_row:
        assert len(set(form.mask.sum(1).tolist())) == 1
    assert not decode(form)[~form.mask].any()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "1:3", "3:16"])
@pytest.mark.parametrize("name", NAMES)
def test_patterns_hold_in_every_stretch(name: str, pattern: str) -> None:
    n, m = (int(part) for part in pattern.split(":"))
    form = pruned(make(name, pattern=pattern), matrix(), norm_of(hessian()) if name == "wanda" else None)
    assert (form.mask.view(OUT, -1, m).sum(2) == n).all()
    assert form.pattern == (n, m)


def test_two_of_four_is_the_best_of_all_six() -> None:
    score = matrix().abs()
    mask = keep_highest(score, RowConfig(pattern="2:4"), "row").view(-1, 4)
    stretches = score.view(-1, 4)
    best = torch.stack([stretches[:, list(pair)].sum(1) for pair in combinations(range(4), 2)]).amax(0)
    torch.testing.assert_close((stretches * mask).sum(1), best)


def test_of_equal_scores_the_later_stay() -> None:
    score = torch.tensor([[1.0, 1, 1, 1], [2, 1, 2, 1], [0, 0, 3, 0]])
    assert highest(score, 2).tolist() == [
        [False, False, True, True],
        [True, False, True, False],
        [False, False, True, True],
    ]


def test_wanda_is_magnitude_where_inputs_are_alike() -> None:
    norm = Norm(WIDTH, torch.device("cpu"))
    norm.tokens, norm.square = 1, torch.full((WIDTH,), 3.0)
    wanda = pruned(make("wanda"), matrix(), norm)
    assert torch.equal(wanda.mask, pruned(make("magnitude", per="row"), matrix()).mask)
    norm.square[::2] = 0.01
    assert pruned(make("wanda"), matrix(), norm).mask[:, 1::2].float().mean() > 0.9


def test_random_is_the_same_for_a_matrix_and_another_for_another() -> None:
    masks = [pruned(make("random"), matrix(seed=seed)).mask for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], pruned(make("random", seed=1), matrix()).mask)


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8", "1:3"])
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_sparsegpt_equals_brute_force(share: float, pattern: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "BLOCK", 20)
    method = SparseGpt(SparseGptConfig(sparsity=None if pattern else share, pattern=pattern, refit=0))
    weight, statistic = matrix(), hessian()
    factors = method.prepare(statistic)
    H = statistic.matrix.double()
    H.diagonal().add_(getattr(factors, "damp"))  # noqa: B009 - of factors
    parts = None if pattern is None else tuple(int(part) for part in pattern.split(":"))
    together = 20 if parts is None else parts[1] if 16 % parts[1] == 0 else 20 // parts[1] * parts[1]
    if parts is not None and together != parts[1]:
        pytest.skip("its mask is chosen a block at a time: see the next test")
    right = optimal_brain_surgeon(weight, H, share, together, parts)  # type: ignore[arg-type] # of two numbers
    found = decode(method.compress(weight, factors).weight)
    assert ((found != 0) == (right != 0)).float().mean() > 0.995  # float32 may turn a tie
    same = ((found != 0) == (right != 0)).all(1)
    torch.testing.assert_close(found[same].double(), right[same], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("width", [48, 300])
def test_refitted_weights_are_those_of_least_squares(width: int) -> None:
    statistic, W = hessian(width, tokens=4 * width), matrix(width=width)
    H, mask = statistic.matrix, torch.rand(OUT, width, generator=torch.Generator().manual_seed(3)) < 0.5
    damp = 0.01 * float(H.diagonal().mean())
    damped = H.double()
    damped.diagonal().add_(damp)
    right = least_squares(W, mask, damped)
    few, many = (refit(W, W * mask, mask, H, damp, steps) for steps in (5, 400))
    errors = [float(output_error(W.double(), V.double(), damped).sum()) for V in (W * mask, few, many, right)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[3]
    assert errors[2] == pytest.approx(errors[3], rel=1e-3)
    assert not many[~mask].any()


@pytest.mark.parametrize("name", ["magnitude", "random", "wanda", "sparsegpt"])
def test_a_refit_makes_no_row_worse(name: str) -> None:
    statistic, W = hessian(), matrix()
    plain, fitted = (pruned(make(name, refit=steps), W, _for(name, steps, statistic)) for steps in (0, 10))
    before, after = (output_error(W, decode(form), statistic.matrix) for form in (plain, fitted))
    assert torch.equal(plain.mask, fitted.mask)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.95 * before.sum()


def _for(name: str, steps: int, statistic: Hessian) -> Statistic | None:
    if steps or name == "sparsegpt":
        return statistic
    return norm_of(statistic) if name == "wanda" else None


def test_methods_rank_as_they_should() -> None:
    statistic, W = hessian(), matrix()
    errors = {
        name: float(output_error(W, decode(pruned(make(name), W, _for(name, 0, statistic))), statistic.matrix).sum())
        for name in NAMES
    }
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"] < errors["random"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_kept_can_be_rounded_too(symmetric: bool) -> None:
    method = SparseGpt(SparseGptConfig(sparsity=0.6, bits=4, group_size=16, symmetric=symmetric))
    form = pruned(method, matrix().bfloat16(), hessian())
    assert isinstance(form.values, Quantized)
    assert form.kept == OUT * WIDTH - round(0.6 * OUT * WIDTH)
    assert not decode(form.values)[~form.mask].any()  # so a format that stores zeros may store the codes
    floats = pruned(make("sparsegpt", sparsity=0.6), matrix().bfloat16(), hessian())
    errors = [float(output_error(matrix(), decode(f), hessian().matrix).sum()) for f in (floats, form)]
    assert errors[0] < errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_a_later_quantization_keeps_zeros(name: str, symmetric: bool) -> None:
    statistic = hessian()
    weight = decode(pruned(make("wanda"), matrix(), norm_of(statistic)))
    method = make(name, bits=4, group_size=16, symmetric=symmetric)
    values = decode(method.compress(weight, method.prepare(statistic)).weight)
    assert not values[weight == 0].any()
    dense = Gptq(GptqConfig(bits=4, group_size=16, symmetric=symmetric))
    assert decode(dense.compress(matrix(), dense.prepare(statistic)).weight).count_nonzero() > 0.6 * OUT * WIDTH


def test_where_nothing_is_known_of_the_inputs_magnitudes_decide() -> None:
    empty: list[Statistic] = [Norm(WIDTH, torch.device("cpu")), Hessian(WIDTH, torch.device("cpu"))]
    for name, statistic in zip(("wanda", "sparsegpt"), empty, strict=True):
        method = make(name)
        statistic.finish()
        found = method.prepare(statistic)
        assert [event.kind for event in found.events] == ["magnitude_fallback"]
        per = "row" if name == "wanda" else "matrix"
        form = method.compress(matrix(), found).weight
        assert isinstance(form, Sparse)
        assert torch.equal(form.mask, pruned(make("magnitude", per=per), matrix()).mask)


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    form = pruned(make("sparsegpt"), matrix(), hessian(dead=(3, 7)))
    assert decode(form).isfinite().all()
    assert not form.mask[:, [3, 7]].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"pattern": "4:4"}, "at least 1 and less than M"),
        ({"pattern": "0:4"}, "at least 1 and less than M"),
        ({"pattern": "4"}, "N:M"),
        ({"pattern": "8:32"}, "at most"),
        ({"pattern": "1:4", "sparsity": 0.5}, "drops 0.75"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        make("wanda", **settings)


def test_a_pattern_that_does_not_divide_is_refused() -> None:
    assert "does not divide the width 50" in str(make("wanda", pattern="2:4").check((8, 50)))
