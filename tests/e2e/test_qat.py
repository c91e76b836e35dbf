"""Training through rounding from end to end: the file holds the very numbers that were trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, content, load, logits
from tiny import build_model, config
from torch import Tensor

from llmshrink import cli, run
from llmshrink.errors import InterruptedRun, PlanError, RecipeError
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.distill import QAT_RATE
from llmshrink.recipe.load import dump, validate
from llmshrink.recipe.schema import Recipe
from llmshrink.train.qat import Qat

W2 = {"name": "rtn", "bits": 2, "group_size": 16}
pytestmark = pytest.mark.usefixtures("without_reader")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers."""
    folder = tmp_path_factory.mktemp("qat") / "model"
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    build_model(folder, config("llama", num_hidden_layers=3, **small))
    return folder


def wanted(model: Path, out: Path, text: Path, qat: dict[str, Any], **more: Any) -> Recipe:
    steps = {
        "data": str(text),
        "length": 16,
        "batch": 2,
        "max_steps": 6,
        "rate": 1e-3,
        "evaluations": 1,
        **more.pop("train", {}),
    }
    stage = {
        "task": "distill",
        "qat": {"method": W2, **qat},
        "loss": {"alpha": 1.0, "temperature": 1.0},
        "train": steps,
    }
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{**stage, **more}],
            "calibration": {"data": str(text), "samples": 12, "length": 16},
            "evaluation": {"data": [], "speed": False},
            "output": str(out),
        }
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a student computed with when it was trained: its matrices by name, and its logits."""
    seen: dict[str, Any] = {}
    save = Qat.save

    def look(self: Qat, folder: Path) -> None:
        model = self.model.eval()
        names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        seen["weights"] = {f"{name}.weight": model.get_submodule(name).weight.detach().clone() for name in names}
        seen["logits"] = logits(model)
        save(self, folder)

    monkeypatch.setattr(Qat, "save", look)
    return seen


def matrices(folder: Path) -> dict[str, Tensor]:
    written = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    return {key: written.weights.get(key) for key in written.weights.compressed}


@pytest.mark.parametrize(
    "qat",
    [
        {},
        {
            "method": {"name": "gptq", "bits": 4, "group_size": 16, "symmetric": False},
            "format": {"name": "gptq"},
            "ignore": [".*o_proj"],
        },
    ],
    ids=["compressed-tensors", "gptq"],
)
def test_what_is_written_is_what_was_trained(
    model: Path, text_file: Path, tmp_path: Path, trained: dict[str, Any], qat: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    recipe = wanted(model, out, text_file, qat, train={"max_steps": 12, "rate": 0.01})
    planned = run.make_plan(recipe)
    report = run.execute(recipe, progress=Silent())
    (stage,), found = report.stages, matrices(out)
    assert len(found) == (18 if "ignore" in qat else 21)
    for key, matrix in found.items():
        assert torch.equal(matrix, trained["weights"][key]), key
    read = StreamedModel(open_source(str(out)), torch.device("cpu")).whole().float().eval() if qat else load(out)[0]
    assert (logits(read) - trained["logits"]).abs().max() < 1e-4
    assert stage.bytes_after == stage.planned_bytes_after == planned.bytes_after < stage.bytes_before / 2
    learned = stage.trained
    assert learned is not None and learned.held_before is not None and learned.held_after is not None
    assert qat or learned.held_after < learned.held_before
    assert (learned.held_after >= learned.held_before) == ("not_learned" in {event.kind for event in report.events})
    codes = [layer for layer in stage.layers if layer.form == "Quantized"]
    assert len(codes) == len(found) and all(layer.relative_error for layer in codes)
    assert stage.method["start"] == qat.get("method", W2)["name"] and all(check.passed for check in stage.checks)


def test_a_stopped_run_gives_the_same_bytes(model: Path, text_file: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    qat = {"method": {**W2, "symmetric": False}}
    first = run.execute(wanted(model, whole, text_file, qat), progress=Silent())
    for stop in (Stopping(step="compress"), Stopping(step="distill", note="step 3 of 6")):
        with pytest.raises(InterruptedRun):
            run.execute(wanted(model, out, text_file, qat), progress=stop)
    again = run.execute(wanted(model, out, text_file, qat), progress=Silent())
    assert content(out) == content(whole)
    curves = [report.stages[0].trained and report.stages[0].trained.curve for report in (first, again)]
    assert curves[0] == curves[1]
    assert [e.kind for e in first.events] == [e.kind for e in again.events]


def test_a_student_is_cut_and_then_rounded(
    model: Path, text_file: Path, tmp_path: Path, trained: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    qat = {"layers": {".*down_proj": {"bits": 4}}}
    recipe = wanted(model, out, text_file, qat, student={"layers": [0, 2], "repair": False}, train={"max_steps": 2})
    (stage,) = run.execute(recipe, progress=Silent()).stages
    assert stage.cut is not None and len(matrices(out)) == 14
    assert all(torch.equal(matrix, trained["weights"][key]) for key, matrix in matrices(out).items())


def test_the_command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen: list[Recipe] = []

    def look(recipe: Recipe, **_: object) -> None:
        seen.append(recipe)
        raise PlanError("seen")

    monkeypatch.setattr(run, "execute", look)
    saved = tmp_path / "recipe.yaml"
    flags = [
        "--method",
        "rtn",
        "--bits",
        "3",
        "--group-size",
        "32",
        "--asymmetric",
        "--format",
        "gptq",
        "--layers",
        "2",
    ]
    assert cli.main(["distill", str(model), *flags]) == 2
    assert "add --qat" in capsys.readouterr().err and not seen
    cli.main(["distill", str(model), *flags, "--qat"])
    saved.write_text(dump(seen[0]))
    cli.main(["distill", "-r", str(saved), "--bits", "2", "--rate", "1e-5"])
    cli.main(["distill", str(model), "--qat"])
    first, second, plain = (recipe.stages[0] for recipe in seen)
    settings = {"name": "rtn", "bits": 3, "group_size": 32, "symmetric": False}
    for stage, changes in ((first, {}), (second, {"bits": 2})):
        assert settings | changes == {k: stage.qat.method.complete()[k] for k in settings}  # type: ignore[union-attr]
        assert stage.qat.format.name == "gptq" and stage.student.layers.count == 2  # type: ignore[union-attr]
    assert (first.train.rate, second.train.rate) == (QAT_RATE, 1e-5)  # type: ignore[union-attr]
    assert plain.qat.method.name == "gptq" and plain.qat.stage.method.settings == {}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("family", "qat", "why"),
    [
        ("llama", {"method": {"name": "nf4"}}, "nf4, written as bnb, stores no even grid"),
        ("llama", {"method": {"name": "fp8"}}, "fp8, written as .*, stores no even grid"),
        ("llama", {"method": {"name": "ternary", "group_size": 16}}, "stores no even grid"),
        ("llama", {"format": {"name": "dense"}}, "rtn, written as dense, stores no even grid"),
        ("llama", {"method": {"name": "rtn"}, "format": {"name": "gguf"}}, "rtn, written as gguf, stores no even grid"),
        ("mixtral", {"method": {"name": "rtn", "group_size": 16}}, "experts .* are not trained through rounding"),
    ],
)
def test_what_has_no_grid_is_refused(
    family: str, qat: dict[str, Any], why: str, models_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=why):
        run.make_plan(wanted(models_folder(family), tmp_path / "out", text_file, qat))


def test_faults_are_told_in_their_places(model: Path, text_file: Path, tmp_path: Path) -> None:
    for qat, where in (
        ({"method": {"name": "rtn", "bits": 5}}, r"stages\[0\]\.qat\.method\.bits"),
        ({"layers": {"(": {"bits": 3}}}, r"stages\[0\]\.qat\.layers"),
        (
            {"method": {"name": "kmeans"}},
            r"stages\[0\]\.qat\.method\.name: 'kmeans' is a method of `llmshrink cluster`",
        ),
        ({"transform": []}, r"stages\[0\]\.qat\.transform: unknown key"),
    ):
        with pytest.raises(RecipeError) as caught:
            wanted(model, tmp_path / "out", text_file, qat)
        assert re.search(where, "\n".join(caught.value.problems)), caught.value.problems
