"""Lottery tickets from end to end: rounds that go on where they were stopped, and a sparse student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, content, load, logits
from safetensors.torch import load_file
from tiny import build_model, config
from torch import Tensor

from llmshrink import run
from llmshrink.errors import InterruptedRun, PlanError, RecipeError
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe
from llmshrink.report.rows import stage_lines
from llmshrink.train.lottery import Lottery
from llmshrink.train.trainer import Distiller

pytestmark = pytest.mark.usefixtures("without_reader")
STEPS, EARLY, MATRICES = 6, 2, 2 * 7


def wanted(model: Path, out: Path, text: Path, lottery: dict[str, Any] | None = None, **more: Any) -> Recipe:
    train = {"data": str(text), "length": 16, "batch": 2, "max_steps": STEPS, "rate": 1e-2}
    drawn = {"rounds": 2, "sparsity": 0.75, "rewind": EARLY / STEPS, **(lottery or {})}
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{"task": "distill", "lottery": drawn, "train": train, **more}],
            "evaluation": {"data": [], "speed": False},
            "output": str(out),
        }
    )


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights with which each training begins."""
    found: list[dict[str, Tensor]] = []
    trainer = Lottery.trainer

    def look(self: Lottery, **given: Any) -> Distiller:
        found.append({name: parameter.detach().clone() for name, parameter in self.model.named_parameters()})
        return trainer(self, **given)

    monkeypatch.setattr(Lottery, "trainer", look)
    return found


def assert_rewound(early: dict[str, Tensor], starts: list[dict[str, Tensor]]) -> None:
    """Later trainings begin with early weights to the last bit, of which each keeps some of those before it."""
    assert len(starts) == 3 and not torch.equal(starts[0]["lm_head.weight"], early["lm_head.weight"])
    for name, weight in early.items():
        kept = [start[name] != 0 for start in starts[1:]]
        assert all(torch.equal(start[name], weight * mask) for start, mask in zip(starts[1:], kept, strict=True))
        pruned = ".layers." in name and weight.ndim == 2
        shares = [float(mask.float().mean()) for mask in kept]
        assert shares == pytest.approx([0.5, 0.25] if pruned else [1, 1]), name
        assert not (kept[1] & ~kept[0]).any()


def test_a_ticket_is_drawn_whatever_stops_it(
    smallest: Path, text_file: Path, tmp_path: Path, begun: list[dict[str, Tensor]]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    first = run.execute(wanted(smallest, whole, text_file), progress=Silent())
    starts = list(begun)
    work = out.with_name("out.partial") / ".work" / "lottery"
    stops = [(1, f"step {EARLY} of"), (2, "step 2 of"), (3, "step 3 of")]
    for training, note in stops:
        stopping = Stopping(step=f"distill, training {training} of 3", note=note)
        with pytest.raises(InterruptedRun):
            run.execute(wanted(smallest, out, text_file), progress=stopping)
        if (training, note) == stops[0]:  # the state that Trainer saved behind that step
            state = load_file(work / "0" / "trainer" / f"checkpoint-{EARLY}" / "model.safetensors")
            early = load_file(work / "early.safetensors")
            assert early.keys() == state.keys() and all(torch.equal(early[name], state[name]) for name in early)
    assert_rewound(early, starts)
    again = run.execute(wanted(smallest, out, text_file), progress=Silent())
    assert content(out) == content(whole)
    (one,), (other,) = first.stages, again.stages
    assert one.trained is not None and other.trained is not None
    assert one.trained.curve == other.trained.curve and one.trained.steps == STEPS + 2 * (STEPS - EARLY)
    assert [found.sparsity for found in one.trained.rounds] == pytest.approx([0, 0.5, 0.75])
    assert one.format == "sparse" and one.bytes_after == one.planned_bytes_after < 0.6 * one.bytes_before
    assert [layer.zeros for layer in one.layers] == [round(0.75 * layer.parameters) for layer in one.layers]
    assert all(check.passed for check in one.checks) and len(one.trained.zeros) == MATRICES
    assert any("drawn in 3 trainings" in line for line in stage_lines(one))
    assert logits(load(out)[0]).isfinite().all()


def test_all_blocks_may_compete(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    """Then matrices lose shares of their own, and the first training's start may be what is gone back to."""
    drawn = {"per": "model", "rounds": 1, "rewind": 0}
    report = run.execute(wanted(smallest, tmp_path / "out", text_file, drawn), progress=Silent())
    (stage,) = report.stages
    total = sum(layer.parameters for layer in stage.layers)
    assert sum(layer.zeros or 0 for layer in stage.layers) == round(0.75 * total)
    assert len({(layer.zeros or 0) / layer.parameters for layer in stage.layers}) > 2
    assert stage.trained is not None and stage.trained.steps == 2 * STEPS
    assert stage.bytes_after == stage.planned_bytes_after


def test_experts_are_written_dense(text_file: Path, tmp_path: Path) -> None:
    build_model(tmp_path / "model", config("mixtral", num_hidden_layers=1, hidden_size=32, intermediate_size=32))
    drawn = {"rounds": 1, "sparsity": 0.5}
    report = run.execute(wanted(tmp_path / "model", tmp_path / "out", text_file, drawn), progress=Silent())
    (stage,) = report.stages
    assert stage.format == "dense" and all(check.passed for check in stage.checks)
    assert sum(layer.zeros or 0 for layer in stage.layers) == sum(layer.parameters for layer in stage.layers) // 2


def test_what_cannot_be_drawn_is_refused(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="cut first, and give this the result"):
        wanted(smallest, out, text_file, student={"layers": [0]})
    with pytest.raises(RecipeError, match="its own teacher: give alpha below 1"):
        wanted(smallest, out, text_file, loss={"alpha": 1})
    plan = run.make_plan(wanted(smallest, out, text_file))
    assert plan.training is not None and plan.training.trainings == 3 and plan.format == "sparse"
    run.execute(wanted(smallest, out, text_file, {"rounds": 1, "sparsity": 0.5}), progress=Silent())
    with pytest.raises(PlanError, match="begins with all weights"):
        run.make_plan(wanted(out, tmp_path / "again", text_file))
