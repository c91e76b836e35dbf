"""What tokens count by gradients, against autograd on the whole model; files that go on; what is refused or told."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, content, load, recipe
from torch import Tensor, nn

from llmshrink import run
from llmshrink.calibration.rows import Rows
from llmshrink.engine import slopes
from llmshrink.engine.gather import gather
from llmshrink.engine.hidden import Hidden
from llmshrink.engine.slopes import Slopes
from llmshrink.engine.workspace import WORK
from llmshrink.errors import InterruptedRun, PlanError, RecipeError
from llmshrink.model.anatomy import Group
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.planning import plan_of
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe
from llmshrink.statistics import Fisher, Hessian

Models = Callable[..., Path]
CPU = torch.device("cpu")
DAMAGED = 20  # bytes from the end


def drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """The tokens of a row that numbers from 0 to 1 stand for: the first up to which the chances add up to more."""
    found: list[int] = []
    for chances, draw in zip(logits.double().softmax(-1), draws.tolist(), strict=True):
        sums = itertools.accumulate(chances.tolist())
        found.append(next(token for token, total in enumerate(sums) if total > draw))
    return torch.tensor(found)


def by_autograd(folder: Path, groups: dict[str, Group], rows: list[Tensor], draws: list[Tensor]) -> dict[str, Tensor]:
    """Squared gradients [tokens] at what the linears of each group give out, one row after another."""
    model, outputs = load(folder)[0], {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            out.retain_grad()
            outputs[name] = out

        return hook

    for parameter in model.parameters():
        parameter.requires_grad_()  # so that every output has a gradient
    for module in {site.module for group in groups.values() for site in group.sites}:
        model.get_submodule(module).register_forward_hook(keep(module))
    found: dict[str, list[Tensor]] = {name: [] for name in groups}
    for row, draw in zip(rows, draws, strict=True):
        logits = model(row[None]).logits[0]
        nn.functional.cross_entropy(logits, drawn(logits.detach(), draw), reduction="sum").backward()
        for name, group in groups.items():
            gradients = [outputs[module].grad for module in dict.fromkeys(site.module for site in group.sites)]
            found[name].append(sum(g.reshape(len(row), -1).square().sum(-1) for g in gradients))  # type: ignore[misc]
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3-moe", "gemma2"])
def test_they_are_those_of_the_whole_model(models_folder: Models, tmp_path: Path, family: str, on_disk: bool) -> None:
    folder, generator = models_folder(family), torch.Generator().manual_seed(3)
    batches = [torch.randint(3, 100, shape, generator=generator) for shape in ((2, 12), (2, 12), (1, 17))]
    draws = [torch.rand(batch.shape, generator=generator) for batch in batches]
    model, below = StreamedModel(open_source(str(folder)), CPU), tmp_path if on_disk else None
    groups = {b.index: [g for g in b.groups if g.sites[0].expert is None] for b in model.anatomy.blocks}
    found = Slopes(model, groups, logits=1 << 13).run(Hidden(model, batches, folder=below), draws, below)

    named = {f"{index}.{n}": group for index, members in groups.items() for n, group in enumerate(members)}
    rows, numbers = ([row for batch in all_ for row in batch] for all_ in (batches, draws))
    expected = by_autograd(folder, named, rows, numbers)
    assert found.keys() == expected.keys() and len(found) >= 6
    for name, squares in expected.items():
        torch.testing.assert_close(found[name], squares, rtol=2e-3, atol=1e-6 * float(squares.max()))
        assert float(squares.max()) > 1.5 * float(squares.mean())  # they differ, or weighing would be for nothing


def test_tokens_are_drawn_by_their_chances() -> None:
    chances = torch.tensor([0.0, 0.1, 0.6, 0.3]).log().expand(1, 5000, 4)
    draws = torch.rand(1, 5000, generator=torch.Generator().manual_seed(0))
    counts = slopes._drawn(draws, slice(0, 5000), chances).flatten().bincount(minlength=4)
    assert counts[0] == 0 and (counts / 5000 - torch.tensor([0.0, 0.1, 0.6, 0.3])).abs().max() < 0.03
    ends = slopes._drawn(torch.tensor([[0.0, 1 - 2**-24]]), slice(0, 2), chances[:, :2])
    assert ends.tolist() == [[1, 3]]


def test_a_token_counts_in_the_hessian_as_often_as_it_weighs(models_folder: Models) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), CPU)
    block, generator = model.anatomy.blocks[0], torch.Generator().manual_seed(7)
    batches = [torch.randint(0, 160, shape, generator=generator) for shape in ((3, 20), (2, 31))]
    hidden, group = Hidden(model, batches), block.groups[0]
    seen: list[Tensor] = []
    model.load_block(0)
    module = model.model.get_submodule(group.sites[0].module)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for number in range(len(batches)):
        hidden.run(0, number)
    handle.remove()
    x, weights = torch.cat(seen).double(), torch.rand(122, generator=generator)

    def weighed(by: Tensor) -> Tensor:
        statistic = gather(model, block, [group], {group: (Hessian, Fisher)}, hidden, {group: by})[group]
        assert isinstance(plain := statistic[Hessian], Hessian) and isinstance(found := statistic[Fisher], Hessian)
        torch.testing.assert_close(plain.matrix.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        if by.eq(1).all():
            assert torch.equal(found.matrix, plain.matrix)
        return found.matrix

    weighed(torch.ones(122))
    torch.testing.assert_close(weighed(weights).double(), (x.T * weights) @ x / len(x), rtol=1e-4, atol=1e-6)


def test_what_tokens_count_is_put_together_in_their_order(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, *_ = plan_of(wanted(smallest, tmp_path / "out", text_file), StreamedModel(open_source(str(smallest)), CPU))
    parts = [[torch.randint(3, 100, (2, 8))], [torch.randint(3, 100, (1, 5))]]
    squares = torch.rand(21)
    each = iter(squares.split([16, 5]))
    monkeypatch.setattr(Slopes, "run", lambda *_: dict.fromkeys(("0.0", "0.1", "0.2", "0.3"), next(each)))
    slopes.make_slopes(work, parts, 0, folder=tmp_path, progress=Silent())
    found = slopes.slopes_of(work, work.model.anatomy.blocks[0], tmp_path)
    assert len(found) == 4
    for weights in found.values():
        torch.testing.assert_close(weights, squares / squares.mean())


# --- runs


def wanted(model: Path, out: Path, text: Path, **method: Any) -> Recipe:
    return recipe(model, out, text, {"name": "kmeans", "bits": 2, "weighting": "gradient", **method})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that went through the model, part by part; there are several parts."""
    monkeypatch.setattr(slopes, "LEAST", 100)
    found, whole = [], Slopes.run

    def counting(self: Slopes, hidden: Hidden, *args: Any) -> dict[str, Tensor]:
        found.append(sum(hidden.rows))
        return whole(self, hidden, *args)

    monkeypatch.setattr(Slopes, "run", counting)
    return found


def test_a_stopped_run_goes_on_with_what_it_has(
    smallest: Path, text_file: Path, tmp_path: Path, counted: list[int], without_reader: None
) -> None:
    run.execute(wanted(smallest, tmp_path / "whole", text_file), progress=Silent())
    parts = counted.copy()
    assert sum(parts) == 12 and len(parts) >= 3
    work = tmp_path / "out.partial" / WORK
    for stop in ({"step": "weigh", "times": 2}, {"note": "block"}):
        with pytest.raises(InterruptedRun):
            run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Stopping(**stop))  # type: ignore[arg-type]
    assert counted == 2 * parts  # what was done before the first stop is not done again
    path = work / "slopes-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-DAMAGED] ^= 1
    path.write_bytes(data)
    report = run.execute(wanted(smallest, tmp_path / "out", text_file), progress=Silent())
    assert counted == [*parts, *parts, parts[1]] and report.stages[0].resumed_blocks == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert report.stages[0].memory.planned_bytes > (report.stages[0].memory.measured_bytes or 0)


def test_they_do_not_depend_on_batches(models_folder: Models) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), CPU)
    groups = {block.index: list(block.groups) for block in model.anatomy.blocks}
    tokens, draws = torch.randint(3, 100, (5, 12)), torch.rand(5, 12)
    one, other = (
        Slopes(model, groups, 1 << 20).run(Hidden(model, list(tokens.split(n))), list(draws.split(n)), None)
        for n in (1, 3)
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-8)


def test_weighed_otherwise_it_is_another_result(
    smallest: Path, text_file: Path, tmp_path: Path, without_reader: None
) -> None:
    for method in ({"name": "kmeans", "bits": 2}, {"name": "gptq", "bits": 2, "group_size": 32}):
        results = []
        for weighting in ("hessian", "gradient"):
            out = tmp_path / f"{method['name']}-{weighting}"
            (done,) = run.execute(
                wanted(smallest, out, text_file, **{**method, "weighting": weighting}), progress=Silent()
            ).stages
            assert all(layer.objective is not None for layer in done.layers if layer.method)
            results.append(content(out))
        assert results[0] != results[1]


def test_inputs_of_the_original_are_not_weighed(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`propagate` goes with weighting hessian"):
        wanted(smallest, tmp_path / "out", text_file, name="gptq", propagate=0.5)


def test_models_without_logits_are_refused(models_folder: Models, text_file: Path, tmp_path: Path) -> None:
    for family in ("bert", "bert-classes"):
        with pytest.raises(PlanError, match="gradients need a model that gives out logits of tokens") as refused:
            run.make_plan(wanted(models_folder(family), tmp_path / "out", text_file))
        assert "weighting: hessian" in str(refused.value.hint)


def test_experts_and_ends_are_told(models_folder: Models, text_file: Path, tmp_path: Path) -> None:
    model = StreamedModel(open_source(str(models_folder("mixtral"))), CPU)
    work, *_ = plan_of(wanted(models_folder("mixtral"), tmp_path / "out", text_file), model)
    (event,) = [event for event in work.events if event.kind == "not_weighed"]
    assert "experts" in event.message and ".experts." in str(event.layer)
    (first, *_) = model.anatomy.blocks
    kinds = {group.sites[0].expert is None: work.needs(group) for group in first.groups}
    assert Fisher in kinds[True] and Fisher not in kinds[False] and Hessian in kinds[False]
    stage = {"targets": ["linears", "head"]}
    wish = recipe(
        models_folder("llama"), tmp_path / "out", text_file, {"name": "kmeans", "weighting": "gradient"}, stage=stage
    )
    work, *_ = plan_of(wish, StreamedModel(open_source(str(models_folder("llama"))), CPU))
    assert [event.layer for event in work.events if event.kind == "not_weighed"] == ["lm_head"]


def test_costs_are_measured_before_it_and_that_is_told(
    smallest: Path, text_file: Path, tmp_path: Path, without_reader: None
) -> None:
    allocate = {"bpw": 14, "candidates": [{"bits": 2}, {"bits": 6}], "rows": 2, "length": 16}
    method = {"name": "kmeans", "weighting": "gradient", "rows": -1}
    stage = {"allocate": allocate, "format": {"name": "codebook"}}
    report = run.execute(recipe(smallest, tmp_path / "out", text_file, method, stage=stage), progress=Silent())
    assert report.stages[0].allocation is not None and report.stages[0].seconds["look ahead"] > 0
    told = [event.message for event in report.events if event.kind == "measured_before"]
    assert told == ["costs were measured before tokens were weighed by gradients"]


def test_rows_go_in_parts_that_keep_no_more_than_all_once() -> None:
    tokens = 1 << 24
    assert all((depth + 1) * slopes.together(tokens, depth) <= tokens for depth in (1, 8, 80))
    rows = Rows(tuple(torch.zeros(n, dtype=torch.long) for n in (5, 3, 9, 1, 1)), "", "")
    assert [list(map(len, part.tokens)) for part in rows.parted(8)] == [[5, 3], [9], [1, 1]]
