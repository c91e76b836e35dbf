"""Runs that distill: make the student, let it learn from its teacher, and hand it on to be written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink import ranks
from llmshrink.checks.preflight import check_finite, check_memory
from llmshrink.engine.budget import planned_caching
from llmshrink.engine.workspace import Workspace
from llmshrink.errors import PlanError, UsageError
from llmshrink.forms import Event
from llmshrink.model.source import Source, open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.words import check_same_tokens
from llmshrink.plan.cache import keeping
from llmshrink.plan.schema import Plan
from llmshrink.plan.steps import Steps
from llmshrink.plan.training import Training
from llmshrink.plan.work import Work
from llmshrink.planning import plan_of, planned, writing_stage_of
from llmshrink.recipe.distill import DistillStage
from llmshrink.recipe.schema import Recipe
from llmshrink.report.schema import CacheReport, Report, StageReport, TrainReport
from llmshrink.train.caching import cache_of
from llmshrink.train.caching import check_room as check_cache_room
from llmshrink.train.data import Examples
from llmshrink.train.distillation import Distillation
from llmshrink.train.folders import ROUNDED, STUDENT, TEXT
from llmshrink.train.lottery import Lottery, draw
from llmshrink.train.prepare import chosen, prepare
from llmshrink.train.qat import Qat
from llmshrink.train.run import finished, train, unlearned

if TYPE_CHECKING:
    from llmshrink.job import Job


def learn_student(
    job: Job,
    training: Training,
    guessed: Work,
    examples: Examples,
    workspace: Workspace,
    done: list[dict[str, Any]],
) -> tuple[Work, Plan, dict[str, Any]]:
    """Make the student, train it, and plan to write it; also what the report says of that."""
    if training.keeping is not None:
        check_cache_room(training.keeping, examples, workspace.work)
    events, told = list(guessed.events), dict[str, Any](method=training.method)
    student, order = job.model, dict[str, Any](kept=None, rounded=None)
    if training.cuts is not None:
        student, made = _made(job, STUDENT, training.student_recipe, student.source, workspace, events)
        assert made.cut is not None
        told["cut"], order["kept"] = made.cut, made.cut.candidates[0].layers
    if training.stage.qat is not None:
        wanted = partial(training.rounded_recipe, student=None if training.cuts is None else student.source.folder)
        rounded, made = _made(job, ROUNDED, wanted, student.source, workspace, events)
        told["blocks"], order["rounded"] = made.blocks, str(rounded.source.folder)
    order["student"], order["text"] = str(student.source.folder), examples.told.fingerprint
    examples = examples.moved(workspace.work / TEXT)
    found = None if training.stage.lottery else finished(workspace, done)  # of a lottery each round may be
    if found is None and ranks.count() > 1:
        ranks.tell({"recipe": json.loads(job.recipe.model_dump_json()), **order})
    trained, report = found or _learn(job, training, student, order, examples, workspace, done)
    work = training.learned(
        StreamedModel(Source(job.model.source.id, trained, job.model.source.commit), job.facts.device)
    )
    work.events = [*events, *unlearned(report)]
    return work, planned(job.recipe, job.model, work, training), {**told, "trained": report}


def _made(
    job: Job, name: str, recipe: Callable[[Path], Recipe], source: Source, workspace: Workspace, events: list[Event]
) -> tuple[StreamedModel, StageReport]:
    """What a run of its own makes of a model before training, done once; its events are added to `events`."""
    folder = workspace.work / name
    if not folder.is_dir():
        job.aside(recipe(folder), source).write(overwrite=True)
    report = Report.model_validate_json((folder / "report.json").read_bytes())
    found = [Event(event.kind, event.message, event.layer, event.data) for event in report.events]
    events += [event for event in found if event not in events]
    return StreamedModel(open_source(str(folder)), job.facts.device), report.stages[0]


def _learn(
    job: Job,
    training: Training,
    student: StreamedModel,
    order: dict[str, Any],
    examples: Examples,
    workspace: Workspace,
    done: list[dict[str, Any]],
) -> tuple[Path, TrainReport]:
    """Train a student that is ready, as the order to all processes says."""
    kept, rounded = order["kept"], order["rounded"]
    told: dict[str, Any] = {"workspace": workspace, "done": done, "device": job.facts.device, "progress": job.progress}
    loading: dict[str, Any] = {
        "kept": kept,
        "examples": examples,
        "work": workspace.work,
        "progress": job.progress,
    }
    if (lottery := training.stage.lottery) is not None:
        load = partial(Lottery, training, student, job.facts.device, **loading)
        return draw(load, lottery, training.steps, examples, **told)
    if rounded is not None:
        start = StreamedModel(open_source(rounded), job.facts.device)
        lesson: Distillation = Qat(training, student, job.facts.device, rounded=start, **loading)
    else:
        lesson = Distillation(training, student, job.facts.device, **loading)
    return train(lesson, training.steps, examples, **told)


def join(job: Job, order: dict[str, Any]) -> None:
    """Train along with the process that holds the workspace and gave this order.

    Raises:
        OutputError: it does not see the same text.
    """
    _, plan, training = plan_of(job.recipe, job.model)
    assert isinstance(training, Training)
    workspace = Workspace(Path(plan.output))  # never entered: nothing is written by it
    examples = chosen(Examples.load(workspace.work / TEXT, None), order["text"])
    student = StreamedModel(open_source(order["student"]), job.facts.device)
    _learn(job, training, student, order, examples, workspace, [])


def taught_by(job: Job, training: Training) -> StreamedModel:
    """With what the student is compared: its teacher, or the model as it was where they read other tokens."""
    if training.stage.teacher is None or training.teacher is None or training.foreign:
        return job.model.original
    return StreamedModel(training.teacher, job.facts.device)


def keep_words(job: Job) -> CacheReport:
    """Write down what a teacher says, for students that learn elsewhere.

    Raises:
        UsageError: the recipe names no folder for it.
        PlanError: the teacher does not predict the next token.
    """
    stage = writing_stage_of(job.recipe)
    if not isinstance(stage, DistillStage) or stage.cache is None or stage.cache.folder is None:
        raise UsageError("To write down what a teacher says, name a folder for it (--cache-folder).")
    teacher = job.model if stage.teacher is None else StreamedModel(open_source(stage.teacher), job.facts.device)
    if not teacher.task.causal:
        raise PlanError(f"{teacher.source.id}: only models that predict the next token can be distilled.")
    if stage.teacher is not None:
        check_same_tokens(job.model.source, teacher.source)
    wanted, steps = keeping(stage, job.model.source, teacher.source), Steps(stage.train, job.model)
    assert wanted is not None
    needed = planned_caching(teacher, steps.length)
    check_memory("write down what the teacher says", needed, job.recipe.run, "--set train.length=N")
    check_finite(teacher, job.progress)
    with tempfile.TemporaryDirectory(prefix="llmshrink-") as work:
        examples = prepare(steps, job.model, job.loader, Path(work, "text"), kept=None, progress=job.progress)
        cache = cache_of(wanted, examples, Path(work), job.facts.device, job.progress)
    job.tell(job.loader.events, examples.events)
    return cache.report()
