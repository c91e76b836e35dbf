"""Several stages from one recipe: chained, stopped anywhere, judged one by one, compared with the model at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import Stopping, content, load, logits
from tiny import build_model, config

from llmshrink import run
from llmshrink.cli import main
from llmshrink.errors import GateError, InterruptedRun, PlanError
from llmshrink.progress import Silent
from llmshrink.recipe import load as load_recipe
from llmshrink.recipe.load import recipes_folder, validate
from llmshrink.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("without_reader")
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
NAMES = ["1-prune", "2-distill", "3-quantize"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers."""
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    build_model(folder, config("llama", num_hidden_layers=3, **SMALL))
    return folder


def wanted(model: Path, out: Path, text: Path, gates: tuple[Any, Any, Any] = ({}, {}, {}), **more: Any) -> Recipe:
    train = {"data": str(text), "length": 16, "batch": 2, "max_steps": 4, "rate": 1e-3}
    stages: list[dict[str, Any]] = [
        {"task": "prune", "cut": {"layers": [0, 2]}},
        {"task": "distill", "train": train},
        {"task": "quantize", "method": {"name": "gptq", "bits": 4, "group_size": 16}},
    ]
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{**stage, "gate": gate} for stage, gate in zip(stages, gates, strict=True)],
            "calibration": {"data": str(text), "samples": 8, "length": 16},
            "evaluation": {"data": [str(text)], "rows": 3, "length": 16, "speed": False},
            "output": str(out),
            **more,
        }
    )


def test_each_stage_goes_on_with_what_the_one_before_made(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run.execute(wanted(model, out, text_file, run={"keep": True}), progress=Silent())
    assert [stage.task for stage in report.stages] == ["prune", "distill", "quantize"]
    assert report.stages[1].trained is not None and report.stages[1].trained.teacher == str(model)
    assert report.before is not None and report.before.tensor_bytes == report.stages[0].bytes_before
    sizes = [stage.after.tensor_bytes for stage in report.stages if stage.after is not None]
    assert sizes == [stage.bytes_after for stage in report.stages] and sizes[0] == sizes[1] > sizes[2]
    places = [tmp_path / f"out-{name}" for name in NAMES[:-1]] + [out]
    alone = {"stages": [{"task": "eval"}], "output": None}
    for place, stage in zip(places, report.stages, strict=True):
        evaluation = wanted(place, out, text_file).evaluation.model_copy(update={"baseline": str(model)})
        given = {**wanted(place, out, text_file).model_dump(mode="json"), **alone}
        recipe = validate({**given, "evaluation": evaluation.model_dump(mode="json")})
        found = run.execute(recipe, progress=Silent()).after
        assert found is not None and stage.after is not None
        assert found.scores[0].kl == pytest.approx(stage.after.scores[0].kl, rel=1e-3, abs=1e-6)
    assert report.after == report.stages[-1].after
    assert all(check.passed is not False for check in run.verify(out, progress=Silent()))
    assert logits(load(out)[0]).isfinite().all() and (out / "loss.csv").is_file()
    assert not (tmp_path / "out.partial").exists()


def test_it_goes_on_wherever_it_was_stopped(model: Path, text_file: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run.execute(wanted(model, whole, text_file), progress=Silent())
    stops = [
        ("stage 1 of 3: compress", ""),
        ("stage 2 of 3: distill", "step 3 of 4"),
        ("stage 3 of 3: compress", ""),
    ]
    for step, note in stops:
        with pytest.raises(InterruptedRun):
            run.execute(wanted(model, out, text_file), progress=Stopping(step=step, note=note))
    report = run.execute(wanted(model, out, text_file), progress=Silent())
    assert content(out) == content(whole) and len(report.stages) == 3


def test_a_stage_that_fails_its_gate_ends_it(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(GateError, match=r"(?s)stage 2-distill: 1 gate failed; what was made is in .*max_kl"):
        run.execute(wanted(model, out, text_file, ({}, {"max_kl": 1e-9}, {})), progress=Silent())
    made = [out.with_name("out.partial") / ".work" / name for name in NAMES]
    assert [folder.is_dir() for folder in made] == [True, True, False]
    times = [(folder / "report.json").stat().st_mtime_ns for folder in made[:2]]
    report = run.execute(wanted(model, out, text_file, run={"keep": True}), progress=Silent())
    kept = [tmp_path / f"out-{name}" / "report.json" for name in NAMES[:2]]
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert not any(stage.gates for stage in report.stages)


def test_a_damaged_stage_is_done_again(model: Path, text_file: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run.execute(wanted(model, whole, text_file), progress=Silent())
    with pytest.raises(InterruptedRun):
        run.execute(wanted(model, out, text_file), progress=Stopping(step="stage 2 of 3: distill", note="step 2 of 4"))
    (path, *_) = sorted((out.with_name("out.partial") / ".work" / NAMES[0]).glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    report = run.execute(wanted(model, out, text_file), progress=Silent())
    assert "1-prune is damaged: the stage is done again" in [event.message for event in report.events]
    assert content(out) == content(whole)


def test_what_cannot_be_chained_is_refused(
    model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = wanted(model, tmp_path / "out", text_file)
    data = recipe.model_dump(mode="json", exclude_unset=True)
    adapter = {**data, "stages": [{"task": "lora"}, data["stages"][2]]}
    with pytest.raises(PlanError, match=r"stages\[0\]: an adapter is no model"):
        run.execute(validate(adapter), progress=Silent())
    nothing = {**data, "stages": [{"task": "prune", "cut": {"layers": [0, 1, 2]}}, data["stages"][2]]}
    with pytest.raises(PlanError, match="nothing would be cut"):
        run.execute(validate(nothing), progress=Silent())
    assert not list(tmp_path.iterdir())
    path = tmp_path / "recipe.yaml"
    path.write_text("{version: 1, stages: [{task: prune}, {task: quantize}]}")
    assert main(["quantize", str(model), "-r", str(path)]) == 2
    assert "is for llmshrink run" in capsys.readouterr().err


def test_the_command(model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(
        "{version: 1, stages: [{task: prune, cut: {layers: [0, 2], repair: false}}, {task: distill, train: {max_steps: "
        "2, length: 16, batch: 2}}], evaluation: {rows: 2, length: 16, speed: false}}"
    )
    texts = ["--data", text_file, "--evaluation", text_file, "--calibration", text_file]
    assert main(["run", str(path), str(model), *map(str, texts), "-o", str(out), "--plan"]) == 0
    found = capsys.readouterr()
    assert "cut -> dense" in found.out and "1 more" in found.err and not out.exists()
    assert main(["run", str(path), str(model), *map(str, texts), "-o", str(out)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Stage 1: prune" in told and "Stage 2: distill" in told and "behind it:" in told
    assert told.endswith(str(out))


@pytest.mark.parametrize("path", sorted((recipes_folder() / "run").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_pipeline_runs(path: Path, tmp_path: Path) -> None:
    data = load_recipe.read(str(path))
    for stage in data["stages"]:
        if "train" in stage:
            stage["train"] = {**stage["train"], "max_steps": 2, "length": 32, "batch": 2}
    data |= {"calibration": {"data": "generator", "samples": 8, "length": 64}, "output": str(tmp_path / "out")}
    data |= {"evaluation": {"data": ["generator"], "rows": 2, "length": 32, "speed": False}}
    report = run.execute(validate(data), progress=Silent())
    assert [stage.task for stage in report.stages] == [stage["task"] for stage in data["stages"]]
    assert report.stages[-1].bytes_after < report.stages[0].bytes_before / 2
