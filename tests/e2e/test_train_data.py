"""What a model is trained on, from end to end: prompts and conversations, resumed, refused, told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Stopping, content
from tiny import TEXT, build_model, config

from llmshrink import run
from llmshrink.errors import InputError, InterruptedRun, OutputError, PlanError
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe
from llmshrink.report.schema import Report, TrainReport

pytestmark = pytest.mark.usefixtures("without_reader")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers with a chat template."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    build_model(folder, config("llama", num_hidden_layers=3, **small))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def lines(folder: Path, *values: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, values)))
    return path


def prompts(folder: Path) -> Path:
    return lines(
        folder, *({"prompt": text[: 8 + i % 9], "completion": text[8 + i % 9 :]} for i, text in enumerate(TEXT))
    )


def wanted(model: Path, out: Path, text: Path | str, evaluated: list[str] | None = None, **train: Any) -> Recipe:
    steps = {"data": str(text), "length": 48, "batch": 4, "max_steps": 6, "rate": 1e-2, **train}
    stage = {"task": "distill", "student": {"layers": [0, 2], "repair": False}, "train": steps}
    return validate(
        {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{**stage, "loss": {"alpha": 1.0, "temperature": 1.0}}],
            "evaluation": {"data": evaluated or [], "speed": False, "length": 60, "rows": 2},
            "output": str(out),
        }
    )


def trained(report: Report) -> TrainReport:
    found = report.stages[0].trained
    assert found is not None and found.text is not None
    return found


STEPS = {"packing": False, "max_steps": None, "max_tokens": 1200}


@pytest.fixture(scope="module")
def whole(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Report]]:
    """A run on prompts, and what it told."""
    folder = tmp_path_factory.mktemp("whole")
    yield folder / "out", run.execute(wanted(deep, folder / "out", prompts(folder), **STEPS), progress=Silent())


def test_answers_are_learned(whole: tuple[Path, Report]) -> None:
    out, report = whole
    found = trained(report)
    assert found.text is not None and found.text.kind == "prompt" and found.text.origin == "data.jsonl"
    assert report.calibration is None and found.text.rows <= len(TEXT) and found.text.length <= 48
    assert 0.5 * found.text.tokens < found.text.counted < found.text.tokens
    assert found.held_after is not None and found.held_before is not None and found.held_after < found.held_before
    assert found.tokens < found.steps * 4 * found.text.length  # padding is not counted
    assert found.tokens == pytest.approx(1200, rel=0.12)
    listed = json.loads((out / "llmshrink-manifest.json").read_bytes())["files"]
    assert {"loss.png", "loss.csv"} <= set(listed)
    points = {(point.step, point.kind) for point in found.curve} | {(0, "held")}
    assert len((out / "loss.csv").read_text().splitlines()) == 1 + len(points)
    card = (out / "README.md").read_text()
    assert "data.jsonl" in card and str(out.parent) not in card


def test_conversations_are_learned(deep: Path, tmp_path: Path) -> None:
    talks = ([{"role": "user", "content": t[:9]}, {"role": "assistant", "content": t[9:40]}] for t in TEXT)
    data = lines(tmp_path, *({"messages": talk, "text": talk[1]["content"]} for talk in talks))
    report = run.execute(wanted(deep, tmp_path / "out", data, [str(data)], length=24, max_steps=2), progress=Silent())
    assert [event.kind for event in report.events] == ["cut_text", "shared_corpus"]
    found = trained(report)
    assert found.text is not None and found.text.kind == "chat" and found.text.counted < found.text.tokens
    plain = shutil.copytree(deep, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        run.execute(wanted(plain, tmp_path / "out2", data), progress=Silent())
    assert not list(tmp_path.glob("out2*"))


def test_a_run_goes_on_with_the_text_it_began_with(deep: Path, whole: tuple[Path, Report], tmp_path: Path) -> None:
    out, data = tmp_path / "out", prompts(tmp_path)
    again = wanted(deep, out, data, **STEPS)
    with pytest.raises(InterruptedRun):
        run.execute(again, progress=Stopping(step="distill", note="step 3"))
    rows = tmp_path / "out.partial" / ".work" / "text" / "rows.arrow"
    kept = rows.read_bytes()
    with pytest.raises(OutputError, match="unfinished run that differs"):
        run.execute(wanted(deep, out, data, **{**STEPS, "max_tokens": 600}), progress=Silent())
    assert rows.read_bytes() == kept
    data.write_text("")
    last = run.execute(again, progress=Silent())
    assert content(out) == content(whole[0])
    for name in ("curve", "tokens", "held_before", "held_after"):
        assert getattr(trained(last), name) == getattr(trained(whole[1]), name)


@pytest.mark.parametrize(
    ("values", "train", "error", "why"),
    [
        ([{"prompt": "a", "completion": ""}], {}, InputError, r"data\.jsonl, line 1: the answer .* is empty"),
        ([{"prompt": "a" * 60, "completion": "b"}], {}, InputError, r"data\.jsonl, line 1: its prompt of \d+ tokens"),
        ([5], {}, InputError, r"data\.jsonl, line 1: expected a string"),
        ([], {}, InputError, r"data\.jsonl' is empty"),
        ([{"text": ""}], {}, InputError, r"data\.jsonl' is empty"),
        (["x"], {}, InputError, "too short to train on"),
        (
            [{"text": "x"}, {"prompt": "a", "completion": "b"}],
            {},
            InputError,
            r"data\.jsonl, line 2 is a prompt with its answer by its keys \(prompt, completion\), and the first entry",
        ),
        (
            [{"prompt": "a", "completion": "b" * i} for i in range(5, 40)],
            {"max_tokens": 30},
            PlanError,
            r"4 rows of \d+",
        ),
        (["x" * 9] * 30, {"patience": 1}, PlanError, "of 6 rows none are: .* takes 20 rows"),
        (["x"], {"data": "self", "kind": "chat"}, PlanError, "plain text: train.kind cannot be chat"),
        (["x"], {"report_to": ["flyte"]}, PlanError, "not installed: flytekit"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before(
    deep: Path, tmp_path: Path, values: list[Any], train: dict[str, Any], error: type[Exception], why: str
) -> None:
    data = lines(tmp_path, *values)
    with pytest.raises(error, match=why):
        run.execute(wanted(deep, tmp_path / "out", **{"text": data, **_named(train)}), progress=Silent())
    assert not list(tmp_path.glob("out*"))


def _named(train: dict[str, Any]) -> dict[str, Any]:
    return {"text" if key == "data" else key: value for key, value in train.items()}


def test_a_text_without_end_gets_one(deep: Path, tmp_path: Path) -> None:
    plan = run.make_plan(wanted(deep, tmp_path / "out", "self", max_steps=None))
    assert [event.kind for event in plan.events] == ["endless_text"] and plan.training is not None
    assert plan.training.steps == (1 << 20) // (4 * 48)


@pytest.mark.parametrize(
    ("text", "train", "error", "why"),
    [
        ("self", {"max_tokens": 191}, PlanError, r"One step is 192 tokens \(4 rows of 48\), .* allows 191\."),
        ("a.txt", {"max_tokens": 191, "kind": "text"}, PlanError, "One step is 192 tokens"),
        ("a.txt", {"patience": 2, "hold": 0}, PlanError, r"train\.hold \(here 0\.0\)"),
        ("a.txt", {"patience": 2, "evaluations": 0}, PlanError, r"train\.evaluations \(here 0\)"),
        ("missing.jsonl", {}, InputError, r"There is no text file .*missing\.jsonl"),
    ],
)
def test_a_plan_refuses_what_it_can_know(
    deep: Path, tmp_path: Path, text: str, train: dict[str, Any], error: type[Exception], why: str
) -> None:
    (tmp_path / "a.txt").write_text("The old fox")
    data = text if text == "self" else tmp_path / text
    with pytest.raises(error, match=why):
        run.make_plan(wanted(deep, tmp_path / "out", data, **train))


def test_a_plan_does_not_refuse_what_it_cannot_know(deep: Path, tmp_path: Path) -> None:
    recipe = wanted(deep, tmp_path / "out", prompts(tmp_path), max_tokens=191)  # rows may be shorter
    assert run.make_plan(recipe).training is not None
