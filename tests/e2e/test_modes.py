"""What a student learns from beside its teacher's words, from end to end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import Stopping, content, load
from tiny import TEXT, build_model, config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmshrink import run
from llmshrink.errors import InterruptedRun, PlanError, RecipeError
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe
from llmshrink.report.schema import Report

pytestmark = pytest.mark.usefixtures("without_reader")
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    build_model(folder, config("llama", num_hidden_layers=3, **SMALL))
    return folder


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is narrower, and has two layers."""
    folder = tmp_path_factory.mktemp("narrow") / "model"
    build_model(folder, config("llama", **{**SMALL, "hidden_size": 16}))
    return folder


def wanted(model: Path, out: Path, text: Path, stage: dict[str, Any], **train: Any) -> Recipe:
    steps = {"data": str(text), "length": 16, "batch": 2, "max_steps": 6, "rate": 1e-3, **train}
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{"task": "distill", "train": steps, **stage}],
            "evaluation": {"data": [], "speed": False},
            "output": str(out),
        }
    )


def assert_goes_on(model: Path, folder: Path, text: Path, stage: dict[str, Any], **train: Any) -> Report:
    """A run that is stopped gives the bytes and the curve of one that is not."""
    whole, out = folder / "whole", folder / "out"
    first = run.execute(wanted(model, whole, text, stage, **train), progress=Silent())
    with pytest.raises(InterruptedRun):
        run.execute(wanted(model, out, text, stage, **train), progress=Stopping(step="distill", note="step 3 of 6"))
    again = run.execute(wanted(model, out, text, stage, **train), progress=Silent())
    assert content(out) == content(whole)
    curves = [report.stages[0].trained and report.stages[0].trained.curve for report in (first, again)]
    assert curves[0] == curves[1]
    return first


def test_states_of_another_width_and_words_of_its_own(
    deep: Path, narrow: Path, text_file: Path, tmp_path: Path
) -> None:
    """Projections are saved with the states and gone in the end; what is drawn is drawn again alike."""
    stage = {"teacher": str(deep), "hidden": {"weight": 0.5}, "policy": {"share": 0.6}}
    report = assert_goes_on(narrow, tmp_path, text_file, stage, accumulate=2)
    model, info = load(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.hidden_size == 16
    trained = report.stages[0].trained
    assert trained is not None and trained.measure == "kl"
    with pytest.raises(PlanError, match="does not ask it"):
        run.make_plan(wanted(narrow, tmp_path / "o", text_file, {**stage, "loss": {"alpha": 0.0}}))


def test_a_student_that_layers_were_dropped_from_knows_which(
    deep: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(_: Any, __: Any, ___: Any, pairs: dict[int, int], ____: Any) -> None:
        seen.append(dict(pairs))
        raise InterruptedRun("that is all")

    monkeypatch.setattr("llmshrink.train.distillation.Likeness.__init__", noted)
    stage = {"student": {"layers": [0, 2], "repair": False}, "hidden": {}}
    with pytest.raises(InterruptedRun):
        run.execute(wanted(deep, tmp_path / "out", text_file, stage), progress=Silent())
    assert seen == [{0: 1, 1: 2}]


def test_states_that_cannot_be_learned_from_are_refused(deep: Path, narrow: Path, text_file: Path) -> None:
    for hidden, why in (
        ({"projection": False}, "states are 16 wide here, 32 in the teacher"),
        ({"layers": {2: 0}}, "layer 2 of the student, which has 2"),
        ({"layers": {0: 3}}, "layer 3 of the teacher, which has 3"),
    ):
        with pytest.raises(PlanError, match=why):
            run.make_plan(wanted(narrow, text_file, text_file, {"teacher": str(deep), "hidden": hidden}))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that reads longer tokens."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    build_model(folder, config("llama", num_hidden_layers=3, vocab_size=260, **SMALL))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=240, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    return folder


def test_who_reads_other_tokens_teaches_too(narrow: Path, foreign: Path, text_file: Path, tmp_path: Path) -> None:
    stage: dict[str, Any] = {"teacher": str(foreign), "hidden": {"weight": 0.1}, "policy": {"share": 0.3}}
    with pytest.raises(PlanError, match="reads other tokens") as refused:
        run.make_plan(wanted(narrow, tmp_path / "out", text_file, stage))
    assert "--loss uld" in str(refused.value.hint)
    sizes = r"it knows \d+ tokens, and .* \d+; 'def f.*' is encoded otherwise\."  # the first probe that is
    assert re.search(sizes, str(refused.value))
    stage["loss"] = {"name": "uld", "alpha": 0.5}
    recipe = wanted(narrow, tmp_path / "out", text_file, stage, max_steps=12, rate=1e-2)
    evaluation = recipe.evaluation.model_validate({"data": [str(text_file)], "rows": 2, "length": 16, "speed": False})
    report = run.execute(recipe.model_copy(update={"evaluation": evaluation}), progress=Silent())
    trained = report.stages[0].trained
    assert trained is not None and trained.measure == "loss" and trained.aligned is not None
    assert 0.2 < trained.aligned < 1 and trained.held_after < trained.held_before  # type: ignore[operator]
    assert [event.kind for event in report.events if event.kind == "other_tokens"] == ["other_tokens"]
    assert report.before is not None and report.after is not None  # the student as it was, not the teacher
    assert report.before.parameters == report.after.parameters and report.after.scores[0].kl is not None
    with pytest.raises(PlanError, match="here the model teaches itself"):
        own = {"student": {"layers": [1], "repair": False}, "loss": {"name": "uld"}}
        run.make_plan(wanted(narrow, tmp_path / "o", text_file, own))


def test_what_exits_learned_outlives_the_layers_behind_them(deep: Path, text_file: Path, tmp_path: Path) -> None:
    """Dropping the last layer costs much less once the one before has learned to say what it says."""
    stage = {"exits": [1], "loss": {"alpha": 1.0, "temperature": 1.0}}
    taught = wanted(deep, tmp_path / "taught", text_file, stage, max_steps=40, rate=1e-2)
    trained = run.execute(taught, progress=Silent()).stages[0].trained
    assert trained is not None and trained.teacher == "its last layer" and trained.measure == "kl"
    assert trained.held_after < 0.5 * trained.held_before  # type: ignore[operator]
    costs = []
    for model in (deep, tmp_path / "taught"):
        out = tmp_path / f"{model.name}-short"
        data = {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{"task": "prune", "cut": {"layers": [0, 1], "repair": False}}],
            "evaluation": {"data": [str(text_file)], "rows": 4, "length": 16, "speed": False},
            "output": str(out),
        }
        report = run.execute(validate(data), progress=Silent())
        assert report.after is not None and report.after.scores[0].kl is not None
        costs.append(report.after.scores[0].kl)
    assert costs[1] < 0.6 * costs[0]


def test_exits_that_make_no_sense_are_refused(deep: Path, text_file: Path, tmp_path: Path) -> None:
    for exits, why in (([0, 2], "layer 2, and layer 2 is the last"), ([5], "names layer 5")):
        with pytest.raises(PlanError, match=why):
            run.make_plan(wanted(deep, tmp_path / "o", text_file, {"exits": exits}))
    for more, why in (({"exits": [1, 1]}, "each layer once"), ({"exits": [1], "policy": {}}, "nobody but the last")):
        with pytest.raises(RecipeError, match=why):
            wanted(deep, tmp_path / "o", text_file, more)
    plans = [
        run.make_plan(wanted(deep, tmp_path / "o", text_file, one)) for one in ({"exits": [1]}, {"teacher": str(deep)})
    ]
    assert plans[0].memory_bytes < plans[1].memory_bytes
