"""Channel scales against what brute force finds from the inputs themselves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from llmshrink.forms import decode
from llmshrink.methods.base import Prepared
from llmshrink.methods.rtn import Rtn, RtnConfig
from llmshrink.statistics import Hessian, Peak
from llmshrink.transforms import load_transform, transform_names
from llmshrink.transforms.awq import Awq, AwqConfig
from llmshrink.transforms.base import Fed, Found, Scaling, repeat
from llmshrink.transforms.smoothquant import SmoothQuant, SmoothQuantConfig

WIDTH, TOKENS = 64, 300
ALONE = (1, WIDTH)


def rounded(weight: Tensor) -> Tensor:
    return decode(Rtn(RtnConfig(bits=3, group_size=16)).compress(weight, Prepared()).weight)


def inputs(seed: int = 0, width: int = WIDTH, tokens: int = TOKENS) -> Tensor:
    """Correlated, with a few channels that are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed * (1 + 20 * (torch.rand(width, generator=generator) > 0.9))


def matrices(count: int = 2, width: int = WIDTH, seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(24 + 8 * i, width, generator=generator) for i in range(count)]


def fed(x: Tensor, weights: list[Tensor]) -> Fed:
    gathered = {}
    for kind in (Hessian, Peak):
        statistic = kind(x.shape[1], x.device)
        statistic.update(x)
        statistic.finish()
        gathered[kind] = statistic
    return Fed(gathered, len(x), tuple(partial(lambda w: w, w) for w in weights), tuple(rounded for _ in weights))


def error(x: Tensor, weights: list[Tensor], scale: Tensor) -> float:
    """The squared error of the outputs, from the inputs themselves."""
    return sum(float(((x / scale) @ rounded(w * scale).T - x @ w.T).double().square().sum()) for w in weights)


def candidates(x: Tensor, weights: list[Tensor], steps: int, repeats: tuple[int, int] = ALONE) -> list[Tensor]:
    """All scales of the grid, by the formulas."""

    def shared(channels: Tensor) -> Tensor:
        times, size = repeats
        return channels.view(-1, times, size).mean(1).flatten()

    magnitude = shared(x.square().mean(0)).sqrt()
    magnitude = magnitude / magnitude.mean()
    shares = shared(torch.cat([w.abs() / w.abs().amax(1, keepdim=True) for w in weights]).mean(0))
    shares = shares / shares.mean()
    found = [torch.ones_like(magnitude)]
    for step in range(1, steps + 1):
        found += [magnitude ** (step / steps), magnitude ** ((step - 1) / steps) / shares ** (1 - (step - 1) / steps)]
    return [s / (s.max() * s.min()).sqrt() for s in found]


def test_awq_finds_the_best_of_the_grid() -> None:
    x, weights = inputs(), matrices()
    found = Awq(AwqConfig(steps=6)).search([fed(x, weights)], ALONE)
    errors = [error(x, weights, scale) for scale in candidates(x, weights, 6)]
    best = min(range(len(errors)), key=errors.__getitem__)
    assert best > 0 and errors[best] < 0.8 * errors[0]
    torch.testing.assert_close(found.scale, candidates(x, weights, 6)[best])
    assert found.error_left == pytest.approx(errors[best] / errors[0], rel=1e-3)


def test_awq_weighs_experts_by_their_tokens() -> None:
    """Each expert has its own rows: what one saw more of counts more."""
    xs, weights = [inputs(1), inputs(2, tokens=40)], matrices(4)
    parts = [fed(xs[0], weights[:2]), fed(xs[1], weights[2:])]
    found = Awq(AwqConfig(steps=4)).search(parts, ALONE)
    pairs = [(xs[0], weights[:2]), (xs[1], weights[2:])]
    grid = candidates(torch.cat(xs), weights, 4)
    errors = [sum(error(x, w, scale) for x, w in pairs) for scale in grid]
    torch.testing.assert_close(found.scale, grid[errors.index(min(errors))], rtol=1e-4, atol=1e-4)
    assert found.error_left == pytest.approx(min(errors) / errors[0], rel=1e-3)


def test_awq_gives_heads_that_share_values_one_scale() -> None:
    x, weights, repeats = inputs(3), matrices(1), (2, 16)  # two heads of values, each taken twice
    found = Awq(AwqConfig(steps=5)).search([fed(x, weights)], repeats)
    assert found.scale.shape == (32,)
    grid = candidates(x, weights, 5, repeats)
    errors = [error(x, weights, repeat(scale, *repeats)) for scale in grid]
    torch.testing.assert_close(found.scale, grid[errors.index(min(errors))], rtol=1e-4, atol=1e-4)
    assert torch.equal(repeat(torch.arange(4), 2, 2), torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]))


def test_awq_leaves_what_no_scale_makes_better() -> None:
    x, weight = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)), matrices(1)[0]
    exact = rounded(rounded(weight))  # already on the grid
    found = Awq(AwqConfig()).search([fed(x, [exact])], ALONE)
    assert found.error_left is not None and found.error_left <= 1
    nothing = Awq(AwqConfig()).search([fed(torch.zeros(3, WIDTH), [weight])], ALONE)
    assert torch.equal(nothing.scale, torch.ones(WIDTH)) and nothing.error_left == 1


def test_dead_channels_get_a_usable_scale() -> None:
    x, weights = inputs(), matrices()
    x[:, 5] = 0
    for weight in weights:
        weight[:, 6] = 0
    for name in ("awq", "smoothquant"):
        scale = some(name).search([fed(x, weights)], ALONE).scale
        assert bool((scale > 0).all() and scale.isfinite().all()), name


def test_smoothquant_is_its_equation() -> None:
    x, weights = inputs(), matrices()
    found = SmoothQuant(SmoothQuantConfig(alpha=0.3)).search([fed(x, weights)], ALONE)
    raw = x.abs().amax(0) ** 0.3 / torch.cat(weights).abs().amax(0) ** 0.7
    torch.testing.assert_close(found.scale, raw / raw.log().mean().exp())
    halfway = SmoothQuant(SmoothQuantConfig()).search([fed(x, weights)], ALONE).scale
    largest, weight = (x / halfway).abs().amax(0), (torch.cat(weights) * halfway).abs().amax(0)
    torch.testing.assert_close(largest / largest[0], weight / weight[0])  # as hard on both sides


# --- what holds of every transform that scales


def some(name: str) -> Scaling:
    cls = load_transform(name)
    return cls(cls.Config())


SCALING = [name for name in transform_names() if issubclass(load_transform(name), Scaling)]


@pytest.mark.parametrize("name", SCALING)
def test_it_is_pure_and_gives_the_same_twice(name: str) -> None:
    x, weights = inputs(), matrices()
    copies, part = [w.clone() for w in weights], fed(x, weights)
    first, again = (some(name).search([part], ALONE) for _ in range(2))
    assert isinstance(first, Found) and torch.equal(first.scale, again.scale)
    assert all(torch.equal(w, copy) for w, copy in zip(weights, copies, strict=True))
    assert first.scale.dtype == torch.float32 and first.scale.shape == (WIDTH,) and bool((first.scale > 0).all())


@pytest.mark.parametrize("name", transform_names())
def test_every_setting_is_described(name: str) -> None:
    fields = load_transform(name).Config.model_fields
    assert fields and all(info.description for info in fields.values())
