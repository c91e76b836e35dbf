"""Learning the codes of a block: what is learned is what is written, and gradients are those of the block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from llmshrink.engine.hidden import Hidden
from llmshrink.engine.reconstruct import _as, _Codes, _Floats, _learned, _Tables, difference, learn
from llmshrink.forms import Codebook, Dense, Form, Quantized, Sparse, decode
from llmshrink.methods.base import Prepared
from llmshrink.methods.kmeans import Kmeans, KmeansConfig
from llmshrink.methods.rtn import Rtn, RtnConfig
from llmshrink.model.anatomy import Matrix
from llmshrink.model.source import open_source
from llmshrink.model.streamed import Decoded, StreamedModel
from llmshrink.recipe.reconstruct import ReconstructSpec

CONFIGS = {
    "symmetric": RtnConfig(bits=3, group_size=32),
    "zero points": RtnConfig(bits=2, group_size=64, symmetric=False),
    **{kind: RtnConfig(type=kind) for kind in ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K")},
}
STEP = 1e-3  # so small that no token goes to another expert
SPEC = ReconstructSpec(steps=30, tokens=64, rate=0.02, scale_rate=0.002)


def stored(weight: Tensor, config: RtnConfig, scales: torch.dtype | None = None) -> Quantized:
    return cast(Quantized, Rtn(config, scales).compress(weight, Prepared()).weight)


def some_weights(rows: int = 8) -> Tensor:
    weight = 0.02 * torch.randn(rows, 256, generator=torch.Generator().manual_seed(2))
    weight[0] = 0  # a scale of zero, in block types
    return weight


@pytest.mark.parametrize("name", CONFIGS)
def test_it_starts_from_what_is_stored(name: str) -> None:
    form = stored(some_weights(), CONFIGS[name], torch.bfloat16)
    learned = _Codes(form, some_weights(), None)
    assert torch.equal(learned.weight(), decode(form))
    assert torch.equal(decode(learned.result()), decode(form)) and torch.equal(learned.result().codes, form.codes)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_learned_is_what_is_written(name: str) -> None:
    """Wherever latents and factors go: scales keep their dtype, and codes their range."""
    form = stored(some_weights(), CONFIGS[name], torch.bfloat16)
    learned, noise = _Codes(form, some_weights(), None), torch.Generator().manual_seed(4)
    with torch.no_grad():
        learned.latent += 3 * torch.randn(learned.latent.shape, generator=noise)
        if learned.factor.requires_grad:
            learned.factor += 0.1 * torch.randn(learned.factor.shape, generator=noise)
    result = learned.result()
    assert torch.equal(learned.weight(), decode(result)) and not torch.equal(result.codes, form.codes)
    assert result.codes.dtype == form.codes.dtype
    assert result.codes.min() >= form.codes.min() and result.codes.max() <= form.codes.max()


def test_gradients_are_those_of_weights_that_were_not_rounded() -> None:
    form = stored(some_weights(), CONFIGS["zero points"])
    learned = _Codes(form, some_weights(), None)
    with torch.no_grad():
        learned.latent[1, 0] = 7.0  # far outside the range: no step changes its code
    upstream = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    learned.weight().backward(upstream)
    scale, zero = (decode(form.scale).repeat_interleave(64, 1), cast(Tensor, form.zero).repeat_interleave(64, 1))
    expected = upstream * scale
    expected[1, 0] = 0
    torch.testing.assert_close(learned.latent.grad, expected)
    by_factor = (upstream * scale * (learned.codes - zero)).view(8, 4, 64).sum(2)
    torch.testing.assert_close(learned.factor.grad, by_factor)


def some_mask() -> Tensor:
    return torch.rand(8, 256, generator=torch.Generator().manual_seed(6)) < 0.5


def moved(learned: _Codes | _Floats) -> None:
    with torch.no_grad():
        learned.latent += 3 * torch.randn(learned.latent.shape, generator=torch.Generator().manual_seed(4))


def test_floats_are_learned_as_they_are_written() -> None:
    weight = some_weights().bfloat16()
    learned = _learned(Dense(weight), weight.float())
    assert isinstance(learned, _Floats)
    assert torch.equal(learned.weight(), weight.float())
    assert torch.equal(learned.result().weight, weight)
    moved(learned)
    assert torch.equal(learned.weight(), learned.result().weight.float())
    assert learned.result().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("stored_as", ["a mask", "zeros"])
def test_dropped_floats_stay_zero(stored_as: str) -> None:
    mask, weight = some_mask(), some_weights().bfloat16()
    weight = torch.where(mask, weight, 0)
    mask = weight != 0
    form: Form = Dense(weight)
    if stored_as == "a mask":
        form = Sparse(mask, Dense(weight), int(mask.sum()))
    learned = _learned(form, weight.float())
    assert isinstance(learned, _Floats)
    learned.weight().sum().backward()
    assert learned.latent.grad is not None and not learned.latent.grad[~mask].any()
    moved(learned)
    result = _as(form, learned.result())
    assert not decode(result)[~mask].any() and decode(result)[mask].all()
    assert torch.equal(decode(result), learned.weight())


@pytest.mark.parametrize("name", ["symmetric", "zero points"])
def test_codes_of_dropped_weights_stay_zero(name: str) -> None:
    """Whether the form has the mask, or only the pruned weight that is quantized says it."""
    mask = some_mask()
    weight = torch.where(mask, 0.02 + some_weights().abs(), 0)
    values = stored(weight, CONFIGS[name])
    assert not decode(values)[~mask].any()
    for form in (values, Sparse(mask, values, int(mask.sum()))):
        learned = _learned(form, weight)
        assert isinstance(learned, _Codes)
        learned.weight().sum().backward()
        assert learned.latent.grad is not None and not learned.latent.grad[~mask].any()
        moved(learned)
        result = _as(form, learned.result())
        assert not decode(result)[~mask].any()
        assert torch.equal(decode(result), learned.weight().masked_fill(~mask, 0))


# --- a block with weights that are lent to it


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_gradients_reach_every_matrix_of_a_block(models_folder: Callable[..., Path], family: str) -> None:
    """Conv1D keeps its weights turned, experts are slices of one tensor; against differences of two outputs."""
    model = StreamedModel(open_source(str(models_folder(family))), torch.device("cpu"))
    tokens = torch.randint(0, 100, (4, 12), generator=torch.Generator().manual_seed(1))
    hidden, block = Hidden(model, [tokens]), model.anatomy.blocks[0]
    model.load_block(0)
    weights = {m.key: model.read(m).float().clone().requires_grad_() for m in block.matrices}
    plain, lent = hidden.run(0, 0), hidden.run(0, 0, weights)
    assert torch.equal(plain, lent)
    direction = torch.randn(lent.shape, generator=torch.Generator().manual_seed(2))
    (lent * direction).sum().backward()
    for key, weight in weights.items():
        if weight.grad is None:  # an expert that saw no token
            assert ".experts." in key
            continue
        gradient = weight.grad
        found = []
        for sign in (1, -1):
            moved = {**weights, key: weight + sign * STEP * gradient / gradient.norm()}
            with torch.no_grad():
                found.append(float((hidden.run(0, 0, moved).double() * direction).sum()))
        assert (found[0] - found[1]) / (2 * STEP) == pytest.approx(float(gradient.norm()), rel=0.02)


def block_in_two_bits(model: StreamedModel) -> dict[Matrix, Quantized]:
    config = RtnConfig(bits=2, group_size=32)
    return {m: stored(model.read(m).float(), config) for m in model.anatomy.blocks[0].matrices}


def prepared(folder: Path) -> tuple[Hidden, dict[Matrix, Quantized]]:
    """States that enter a block which is loaded in two bits, and those that left the original."""
    model = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    rows = torch.randint(0, 100, (12, 16), generator=torch.Generator().manual_seed(5))
    hidden, forms = Hidden(model, list(rows.split(2)), originals=True), block_in_two_bits(model)
    model.load_block(0)
    hidden.advance_originals(0)
    model.load_block(0, {m.key: Decoded(lambda form=form: decode(form)) for m, form in forms.items()})
    return hidden, forms


def test_the_block_comes_nearer_to_the_original(models_folder: Callable[..., Path]) -> None:
    hidden, forms = prepared(models_folder("llama"))
    block = hidden.model.anatomy.blocks[0]
    before, found = difference(block, hidden), learn(block, forms, hidden, SPEC, seed=0, scale=1.0)
    hidden.model.load_block(0, {m.key: Decoded(lambda form=form: decode(form)) for m, form in found.items()})
    after = difference(block, hidden)
    assert after < 0.8 * before and found.keys() == forms.keys()
    rest = [hidden.run(0, n).double() - state.double() for n, state in enumerate(hidden.originals)]
    assert torch.cat(rest).square().mean() == pytest.approx(after, rel=1e-5)
    again = learn(block, forms, prepared(models_folder("llama"))[0], SPEC, seed=0, scale=1.0)
    assert all(torch.equal(decode(again[m]), decode(form)) for m, form in found.items())


def test_forms_that_cannot_be_learned_say_so() -> None:
    form = stored(some_weights(), CONFIGS["symmetric"])
    assert form.learnable
    assert not replace(form, levels=torch.tensor([0.0, 1.0])).learnable
    assert not replace(form, codes=form.codes.float()).learnable
    assert not replace(form, block=(2, 32)).learnable and not replace(form, block=64).learnable


# --- tables of values


CLUSTERED = [{"bits": 2, "rows": 4, "scales": False}, {"bits": 2, "rows": -1}, {"bits": 1, "dim": 4, "rows": 4}]


def clustered(weight: Tensor, settings: dict[str, Any]) -> Codebook:
    method = Kmeans(KmeansConfig(weighting="none", **settings))
    return cast(Codebook, method.compress(weight.bfloat16(), Prepared()).weight)


@pytest.mark.parametrize("settings", CLUSTERED)
def test_tables_start_from_what_is_stored(settings: dict[str, Any]) -> None:
    form = clustered(some_weights(), settings)
    learned = _learned(form, some_weights())
    assert torch.equal(learned.weight(), decode(form))
    result = cast(Codebook, learned.result())
    assert torch.equal(result.codes, form.codes) and torch.equal(result.table, form.table)


@pytest.mark.parametrize("settings", CLUSTERED)
def test_latents_start_next_to_the_weights(settings: dict[str, Any]) -> None:
    learned = _Tables(clustered(some_weights(), settings), some_weights())
    latent = (learned.latent.detach() * learned._unit).view(8, 256) * learned._scale
    before = (decode(learned.form) - some_weights()).norm()
    assert (latent - some_weights().bfloat16()).norm() < 0.1 * before


@pytest.mark.parametrize("settings", CLUSTERED)
def test_tables_that_are_learned_are_written(settings: dict[str, Any]) -> None:
    learned, noise = _Tables(clustered(some_weights(), settings), some_weights()), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for each in (learned.latent, learned.shift, learned.factor):  # values pass each other
            each += 0.5 * torch.randn(each.shape, generator=noise)
    result = learned.result()
    assert torch.equal(decode(result), learned.weight().detach())
    assert result.table.dtype == learned.form.table.dtype
    assert settings.get("dim", 1) > 1 or bool((result.table.float().diff(dim=1) >= 0).all())


def test_gradients_reach_latents_and_values() -> None:
    learned = _Tables(clustered(some_weights(), CLUSTERED[0]), some_weights())
    upstream = torch.randn(8, 256, generator=torch.Generator().manual_seed(5))
    (learned.weight() * upstream).sum().backward()
    assert learned.latent.grad is not None and learned.shift.grad is not None
    assert torch.allclose(learned.latent.grad, upstream.view(2, -1, 1) * learned._unit)
    codes = learned.form.codes.view(2, -1).long()
    right = torch.zeros(2, 4).scatter_add_(1, codes, upstream.view(2, -1))
    assert torch.allclose(learned.shift.grad, right[..., None] * learned._unit, rtol=1e-4)
