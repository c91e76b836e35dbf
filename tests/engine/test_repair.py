"""What is fitted after a cut, against least squares by brute force; and what writes to the states between blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import build_model, config
from torch import Tensor
from transformers import GraniteConfig

from llmshrink.engine.groups import GroupCompressor, Made
from llmshrink.engine.hidden import Hidden
from llmshrink.engine.reconstruct import difference
from llmshrink.engine.repair import DAMPS, Missing, _Fitter, best_fit, repair
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.cut import Cuts
from llmshrink.plan.work import Work
from llmshrink.recipe.load import validate
from llmshrink.recipe.stages import CutStage
from llmshrink.statistics import Gathered, NoStatistic


def sums(x: Tensor, r: Tensor) -> Missing:
    """What is gathered of inputs and of what is missing, in two batches."""
    found = Missing.none((r.shape[1], x.shape[1]), x.device)
    for part in (slice(0, 40), slice(40, None)):
        found.add(x[part].float(), r[part].float())
    return found


def problem(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 2.0
    return x, torch.randn(tokens, 4, generator=generator) + 1.0


@pytest.mark.parametrize("bias", [False, True])
def test_the_fit_against_lstsq(bias: bool) -> None:
    x, r = (tensor.double() for tensor in problem(90, 3))
    found = sums(x, r)
    added, shift = found.fitted(0.05, bias=bias)
    centred = x - x.mean(0) if bias else x
    damp = 0.05 * float((centred.T @ centred / 90).diagonal().mean())
    ones = torch.ones(90, int(bias), dtype=torch.float64)
    rows = torch.cat([x, ones], dim=1) / 90**0.5
    held = torch.cat([damp**0.5 * torch.eye(7, dtype=torch.float64), torch.zeros(7, int(bias)).double()], dim=1)
    right = torch.cat([r / 90**0.5, torch.zeros(7, 4, dtype=torch.float64)])
    exact = torch.linalg.lstsq(torch.cat([rows, held]), right).solution
    assert torch.allclose(added, exact[:7].T, atol=1e-5)
    assert (shift is not None) is bias and (shift is None or torch.allclose(shift, exact[7], atol=1e-5))
    rest = r - x @ added.T - (0 if shift is None else shift)
    assert found.left(added, shift) == pytest.approx(float(rest.square().sum()), rel=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_mask_stays_and_what_is_left_is_the_best(bias: bool) -> None:
    x, r = (tensor.double() for tensor in problem(90, 5))
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(6)) < 0.5
    added, shift = sums(x, r).fitted(0.05, bias=bias, mask=mask)
    centred, rest = (t - t.mean(0) if bias else t for t in (x, r))
    damp = 0.05 * float((centred.T @ centred / 90).diagonal().mean())
    for row, kept, own in zip(rest.T, mask, added, strict=True):
        some = centred[:, kept]
        right = torch.linalg.solve(some.T @ some / 90 + damp * torch.eye(some.shape[1]).double(), some.T @ row / 90)
        assert torch.allclose(own[kept], right, atol=1e-3)
        assert not own[~kept].any()
    assert shift is None or torch.allclose(shift, (r - x @ added.T).mean(0), atol=1e-4)


def test_the_damping_is_what_helps_on_rows_held_back() -> None:
    (x, r), (other, rest) = problem(20, 4), problem(4000, 4)  # r has nothing to do with x but for its mean
    scores = {}
    for damp in DAMPS:
        scores[damp] = float((rest - other @ sums(x, r).fitted(damp, bias=False)[0].float().T).square().sum())
    best = min(scores, key=lambda damp: scores[damp])
    found = best_fit(sums(x, r), sums(other, rest), None, bias=False)
    assert found is not None
    assert torch.allclose(found[0], sums(torch.cat([x, other]), torch.cat([r, rest])).fitted(best, bias=False)[0])


def test_what_makes_it_worse_is_not_fitted() -> None:
    (x, r), (other, _) = problem(20, 5), problem(400, 6)
    assert best_fit(sums(x, r), sums(other, torch.zeros(400, 4)), None, bias=False) is None
    assert best_fit(sums(x, r), sums(other, torch.zeros(400, 4)), 0.1, bias=False) is not None


def cut(folder: Path, cuts: dict[str, object]) -> tuple[Work, Hidden, Made]:
    """The first block of what a stage leaves of a model, with the states of both models behind it and before it."""
    data = {"version": 1, "model": {"id": str(folder)}, "stages": [{"task": "prune", "cut": cuts}]}
    recipe = validate({**data, "calibration": {"samples": 4, "length": 32}})
    (stage,) = recipe.stages
    assert isinstance(stage, CutStage)
    found = Cuts(recipe, stage, StreamedModel(open_source(str(folder)), torch.device("cpu")))
    work = found.work(found.first(found.shapes[0]))
    batches = list(torch.randint(2, 150, (8, 4, 32), generator=torch.Generator().manual_seed(5)))
    hidden = Hidden(work.model, batches, originals=True, original=work.original)
    block, made = work.model.anatomy.blocks[0], Made()
    made.tensors |= {key: work.model.weights.dense(key) for key in block.keys}
    statistics: dict[object, Gathered] = {
        g: {NoStatistic: NoStatistic(g.width, hidden.model.device)} for g in block.groups
    }
    for part in GroupCompressor(work).compress(list(block.groups), statistics):  # type: ignore[arg-type]
        made.add(part)
    hidden.advance_originals(0)
    return work, hidden, made


def straight(folder: Path) -> dict[str, float]:
    """The linears of the first block that write straight to the states, with their factors."""
    work, hidden, made = cut(folder, {"layers": [0]})
    assert work.repair is not None
    block = work.model.anatomy.blocks[0]
    work.model.load_block(0, made.decoded)
    found = _Fitter(block, made, hidden, work.repair).straight()
    return {matrix.site.module.removeprefix(block.prefix + "."): round(factor, 4) for matrix, factor in found.items()}


@pytest.mark.parametrize(
    ("family", "writers"),
    [
        ("llama", ["mlp.down_proj", "self_attn.o_proj"]),
        ("gpt2", ["mlp.c_proj", "attn.c_proj"]),
        ("opt", ["fc2", "self_attn.out_proj"]),
        ("gpt-neox", ["mlp.dense_4h_to_h", "attention.dense"]),
        ("falcon", ["mlp.dense_4h_to_h", "self_attention.dense"]),
        ("bloom", ["mlp.dense_4h_to_h", "self_attention.dense"]),
        ("phi3", ["mlp.down_proj", "self_attn.o_proj"]),
        ("gemma2", []),  # norms behind its layers
        ("olmo2", []),
        ("mixtral", []),  # its experts write last, and they are not fitted
        ("bert", []),  # norms behind the sum
    ],
)
def test_what_writes_to_the_states(models_folder: Callable[..., Path], family: str, writers: list[str]) -> None:
    assert straight(models_folder(family)) == dict.fromkeys(writers, 1.0)


def test_what_is_written_with_a_factor(tmp_path: Path) -> None:
    like = {key: value for key, value in config("llama").to_dict().items() if key in GraniteConfig().to_dict()}
    build_model(tmp_path / "model", GraniteConfig(**{**like, "model_type": "granite", "residual_multiplier": 0.25}))
    assert straight(tmp_path / "model") == {"mlp.down_proj": 0.25, "self_attn.o_proj": 0.25}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "phi3", "mixtral", "bert", "falcon-alibi"])
def test_the_block_comes_nearer_to_the_original(models_folder: Callable[..., Path], family: str) -> None:
    what = {"heads": "50%"} if family == "mixtral" else {"neurons": "75%"}
    work, hidden, made = cut(models_folder(family), what)
    assert work.repair is not None
    block = work.model.anatomy.blocks[0]
    before = repair(block, made, hidden, GroupCompressor(work), work.repair)
    work.model.load_block(0, made.decoded)
    after = difference(block, hidden)
    assert 0 < after < 0.97 * before
    # What is off is what the states themselves say it is.
    hidden.advance(0)
    assert hidden.off() == pytest.approx(after, rel=1e-5)


def test_copies_of_neurons_are_made_up_for_exactly(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", config("llama", num_hidden_layers=1))
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            weight = getattr(model.model.layers[0].mlp, name).weight
            weight[64:] = weight[:64]
    model.save_pretrained(tmp_path / "model")
    work, hidden, made = cut(tmp_path / "model", {"neurons": 64, "damp": 1e-9})  # the first 64
    assert work.repair is not None
    before = repair(work.model.anatomy.blocks[0], made, hidden, GroupCompressor(work), work.repair)
    work.model.load_block(0, made.decoded)
    assert difference(work.model.anatomy.blocks[0], hidden) < 1e-6 * before
    both = model.model.layers[0].mlp.down_proj.weight
    fitted = made.decoded["model.layers.0.mlp.down_proj.weight"].weight()
    assert torch.allclose(fitted, both[:, :64] + both[:, 64:], atol=2e-3)
