"""The search over block types against brute force, against a plain encoder, and at its edges."""

from __future__ import annotations

import pytest
import torch
from helpers import tensors
from oracles import least_error_of_any_integers, least_error_of_any_pair
from pydantic import ValidationError
from torch import Tensor

from llmshrink.block_types import BLOCK_TYPES, BlockType
from llmshrink.forms import Quantized, decode
from llmshrink.methods import blocks
from llmshrink.methods.base import Prepared
from llmshrink.methods.grid import BlockConfig, BlockGrid, choose_grid, round_to
from llmshrink.methods.rtn import Rtn, RtnConfig

NESTED = [name for name, kind in BLOCK_TYPES.items() if kind.nested is not None]
WIDTH = 512


def weights(heavy: bool = False, rows: int = 8) -> tuple[Tensor, Tensor]:
    """Weights [rows, in] and the importance of each input."""
    torch.manual_seed(0)
    normal = torch.randn(rows, WIDTH)
    return 0.02 * (normal / torch.rand(rows, WIDTH).sqrt() if heavy else normal), torch.rand(WIDTH).square() + 0.01


def errors(weight: Tensor, name: str, cost: Tensor | None = None) -> Tensor:
    """Weighted squared error of each block."""
    config = BlockConfig(type=name)
    grid = choose_grid(weight, config, torch.float16, cost)
    rest = (weight - decode(grid.form(round_to(grid, weight, config), config))).square()
    return (rest if cost is None else rest * cost).view(len(weight), -1, BLOCK_TYPES[name].size).sum(2)


def plain(weight: Tensor, kind: BlockType) -> Tensor:
    """Squared error of each block where every group just covers its range."""
    low, high = kind.code_range
    x = weight.view(-1, kind.size // kind.group, kind.group)
    least, most = x.amin(2).clamp(max=0), x.amax(2).clamp(min=0)
    scale = (most - least) / high if kind.minimum else x.abs().amax(2) / high
    minimum = -least if kind.minimum else torch.zeros_like(scale)
    for table in (scale, minimum):
        unit = (table.amax(1, keepdim=True) / kind.scale_range[1]).half().float() if kind.nested else None
        table.copy_(table.half().float() if unit is None else (table / unit).round().nan_to_num(0) * unit)
    codes = ((x + minimum[..., None]) / scale[..., None]).nan_to_num(0).round().clamp(low, high)
    rest = x - (codes * scale[..., None] - minimum[..., None])
    return rest.square().sum((1, 2)).view(len(weight), -1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_a_scale_and_a_minimum_are_close_to_the_best_of_all(name: str, weighted: bool) -> None:
    weight, cost = weights(rows=2)
    cost = cost if weighted else torch.ones(WIDTH)
    found = errors(weight, name, cost).flatten()
    groups, costs = weight.view(-1, 32), cost.view(-1, 32).repeat(2, 1)
    best = least_error_of_any_pair(groups, costs, BLOCK_TYPES[name].code_range[1])
    assert found.sum() <= 1.04 * best.sum()


@pytest.mark.parametrize("name", NESTED)
def test_integers_are_close_to_the_best_of_all_under_their_float16(name: str) -> None:
    kind, (weight, cost) = BLOCK_TYPES[name], weights(rows=4)
    tables = blocks.search(weight, kind, cost)
    groups = weight.view(-1, kind.size // kind.group, kind.group)
    costs = cost.view(-1, kind.size // kind.group, kind.group).repeat(4, 1, 1)
    assert tables.scale_unit is not None
    units = [None if unit is None else unit.flatten() for unit in (tables.scale_unit, tables.minimum_unit)]
    best = least_error_of_any_integers(groups, costs, kind, *units)
    assert errors(weight, name, cost).sum() <= 1.05 * best.sum()


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_no_block_is_worse_than_where_every_group_covers_its_range(name: str, heavy: bool) -> None:
    weight, _ = weights(heavy)
    assert (errors(weight, name) <= plain(weight, BLOCK_TYPES[name])).all()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_importance_is_what_the_search_minimises(name: str) -> None:
    weight, cost = weights()
    config = BlockConfig(type=name)
    grid = choose_grid(weight, config, torch.float16)
    rest = (weight - decode(grid.form(round_to(grid, weight, config), config))).square() * cost
    assert errors(weight, name, cost).sum() < rest.sum()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_form_means_what_the_grid_does(name: str) -> None:
    weight, cost = weights()
    config = BlockConfig(type=name)
    grid = choose_grid(weight, config, torch.float16, cost)
    steps = round_to(grid, weight, config)
    low, high = config.code_range
    assert low <= steps.min() and steps.max() <= high
    assert torch.equal(decode(grid.form(steps, config)), grid.decode(steps))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_form_promised_is_the_form_made(name: str) -> None:
    method = Rtn(RtnConfig(type=name), torch.float16)
    weight = weights()[0].bfloat16()
    made, promised = (
        list(tensors(f.weight)) for f in (method.compress(weight, Prepared()), method.form((8, WIDTH), weight.dtype))
    )
    assert [(n, t.shape, t.dtype) for n, t in made] == [(n, t.shape, t.dtype) for n, t in promised]
    assert all(t.is_meta for n, t in promised if n != ".levels")
    assert all(t.is_contiguous() for _, t in made)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    weight, cost = weights()
    alone = torch.cat([errors(part, name, cost) for part in weight.split([3, 5])])
    together = errors(weight, name, cost)
    assert (alone == together).float().mean() > 0.5  # sums in another order may break a tie
    torch.testing.assert_close(alone.sum(), together.sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_without_usable_scales(name: str) -> None:
    """All zero, one weight alone, far too small and large: finite tables, and what can be stored is."""
    weight, _ = weights(rows=6)
    weight[0] = 0
    weight[1, :256] = 0
    weight[1, 7] = 0.7
    weight[2] *= 1e-12
    weight[3] *= 1e6
    weight[4] = 0.25
    config = BlockConfig(type=name)
    grid = choose_grid(weight, config, torch.float16)
    form = grid.form(round_to(grid, weight, config), config)
    assert isinstance(form, Quantized)
    values = decode(form)
    assert values.isfinite().all()
    assert (values[0] == 0).all() and values[2].abs().max() <= 1e-6
    assert values[1, 7].item() == pytest.approx(0.7, rel=0.02)
    assert (values[3] - weight[3]).norm() < 0.6 * weight[3].norm()
    assert torch.allclose(values[4], weight[4], rtol=0.02)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_weights_on_a_grid_are_found(name: str) -> None:
    low, high = BLOCK_TYPES[name].code_range
    steps = torch.linspace(low, high, 32).round().repeat(2, 1)
    weight = steps * torch.tensor([[0.5], [-0.5]])
    assert errors(weight, name).max() == 0


def test_scales_move_on_the_grid_they_are_stored_on() -> None:
    weight, cost = weights()
    grid = choose_grid(weight, BlockConfig(type="Q4_K"), torch.float16, cost)
    assert isinstance(grid, BlockGrid) and grid.scale_unit is not None
    moved = grid.storable("scale", grid.scale[:, 9] * 1.1, 9)
    integers = moved / grid.scale_unit[:, 1]
    assert torch.allclose(integers, integers.round(), atol=1e-4) and integers.min() >= 1 and integers.max() <= 63
    inside = integers < 63
    assert inside.any()
    assert ((moved - grid.scale[:, 9] * 1.1).abs() <= 0.51 * grid.scale_unit[:, 1])[inside].all()


def test_a_type_says_all_that_the_other_settings_do() -> None:
    for given in ({"bits": 3}, {"group_size": 64}, {"symmetric": False}, {"scales": "minmax"}):
        with pytest.raises(ValidationError, match="Q4_K says it already"):
            BlockConfig(type="Q4_K", **given)
    assert BlockConfig(type="Q4_K").group(512) == 32
    assert "blocks of 256" in str(BlockConfig(type="Q4_K").why_not((8, 288)))
