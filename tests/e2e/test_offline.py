"""Distillation from what a teacher said once: the teacher is there for that alone, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import Stopping, content
from tiny import build_model, config

from llmshrink import run
from llmshrink.cli import main
from llmshrink.errors import InterruptedRun, PlanError, RecipeError
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe
from llmshrink.report.schema import CacheReport, Report, TrainReport
from llmshrink.train import caching, distillation

pytestmark = pytest.mark.usefixtures("without_reader")
CUT = {"layers": [0, 2], "repair": False}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    build_model(folder, config("llama", num_hidden_layers=3, **small))
    return folder


def wanted(
    model: Path, out: Path, text: Path, cache: dict[str, Any] | None, max_steps: int = 20, **stage: Any
) -> Recipe:
    steps = {"data": str(text), "length": 16, "batch": 2, "max_steps": max_steps, "rate": 1e-2, "evaluations": 0}
    loss = stage.pop("loss", {"alpha": 1.0, "temperature": 1.0})
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{"task": "distill", "student": CUT, "loss": loss, "cache": cache, "train": steps, **stage}],
            "evaluation": {"data": [], "speed": False},
            "output": str(out),
        }
    )


def trained(report: Report) -> TrainReport:
    found = report.stages[0].trained
    assert found is not None and found.held_before is not None and found.held_after is not None
    return found


def test_a_student_learns_without_the_teacher(
    deep: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = trained(run.execute(wanted(deep, tmp_path / "online", text_file, None, max_steps=40), progress=Silent()))
    monkeypatch.delattr(distillation, "Online")
    recipe = wanted(deep, tmp_path / "out", text_file, {"tokens": 39}, max_steps=40)
    planned = run.make_plan(recipe).training
    found = trained(run.execute(recipe, progress=Silent()))
    assert found.cache is not None and planned is not None and planned.cache is not None
    assert planned.cache.bytes_per_token == 20 + 39 + 4 < found.cache.bytes_per_token
    assert planned.cache.bytes >= found.cache.positions * 63
    assert found.held_before == pytest.approx(online.held_before, rel=0.1)
    assert found.held_after == pytest.approx(online.held_after, rel=0.2)
    assert found.held_after < 0.9 * found.held_before  # type: ignore[operator]
    assert not (tmp_path / "out" / ".work").exists()


def test_a_stopped_run_gives_the_same_bytes(
    deep: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "SHARD", 160)
    run.execute(wanted(deep, tmp_path / "whole", text_file, {}, max_steps=6), progress=Silent())
    recipe = wanted(deep, tmp_path / "out", text_file, {}, max_steps=6)
    for step, note in (("cache", "shard 2 of"), ("distill", "step 4 of")):
        with pytest.raises(InterruptedRun):
            run.execute(recipe, progress=Stopping(step=step, note=note))
    run.execute(recipe, progress=Silent())
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_others_learn_from_what_is_there(
    deep: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = {"folder": str(tmp_path / "cache")}
    given = ["distill", str(deep), "--data", str(text_file), "--max-steps", "20", "--batch", "2", "--cache-only"]
    given += ["--temperature", "1", "--set", "train.length=16", "--cache", "sampled", "--json"]
    assert main(given) == 2 and "name a folder" in capsys.readouterr().err
    assert main([*given, "--cache-folder", cache["folder"]]) == 0
    first = CacheReport.model_validate_json(capsys.readouterr().out)
    second = wanted(deep, tmp_path / "two", text_file, cache)
    assert trained(run.execute(second, progress=Stopping(step="cache"))).cache == first
    student = tmp_path / "student"  # it stands alone: nobody who teaches is here
    build_model(student, config("llama", hidden_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=168))
    alone = wanted(student, tmp_path / "three", text_file, cache, student=None)
    plan = run.make_plan(alone).training
    assert plan is not None and plan.teacher == "model" and plan.cache is not None and plan.cache.found
    found = trained(run.execute(alone, progress=Stopping(step="cache")))
    assert found.teacher == "model" and found.held_after < 0.85 * found.held_before  # type: ignore[operator]
    with pytest.raises(PlanError, match="nothing to learn"):
        run.make_plan(wanted(student, tmp_path / "four", text_file, {}, student=None))


def test_the_command(deep: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["distill", str(deep), "--layers", "0,2", "--set", "student.repair=false", "--data", str(text_file)]
    given += [
        "--max-steps",
        "3",
        "--set",
        "train.length=16",
        "--set",
        "evaluation.data=[]",
        "-o",
        str(tmp_path / "out"),
    ]
    given += ["--set", "evaluation.speed=false", "--cache", "topk", "--cache-folder", str(tmp_path / "cache")]
    assert main([*given, "--plan"]) == 0
    assert "written down first: 84 tokens of each position, topk, softened by 2, 119 bytes" in capsys.readouterr().out
    assert main(given) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "its words were written down once (topk): 84 of 160 tokens of each position" in told
    assert main([*given, "--plan", "--overwrite"]) == 0
    assert "was written down before" in capsys.readouterr().out


def test_what_a_cache_cannot_teach_is_refused(deep: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("reverse-kl", "jsd"):
        with pytest.raises(RecipeError, match="a cache has some tokens of the teacher's"):
            wanted(deep, tmp_path / "out", text_file, {}, loss={"name": name})
