"""What llmshrink does, one function each; `Job` tells the whole story.

What trains is imported where it is used: Trainer and peft take seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from llmshrink import pipeline, ranks
from llmshrink.checks.finished import verify_folder
from llmshrink.checks.gates import check_gates, check_size
from llmshrink.errors import InterruptedRun, UsageError
from llmshrink.job import Job
from llmshrink.machine import StopSignal, enough_memory, environment, pick_device, quiet_libraries, threads
from llmshrink.memory import anonymous_bytes, fix_malloc, memory_limit
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.truncate import truncate
from llmshrink.plan.adapting import Adapting
from llmshrink.plan.schema import Plan
from llmshrink.planning import adapter_plan, open_model, plan_of, stages_of, writing_stage_of
from llmshrink.progress import Progress, Silent
from llmshrink.recipe.distill import DistillStage
from llmshrink.recipe.lora import LoraStage
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import CutStage
from llmshrink.report.schema import CacheReport, Check, Report, SensitivityReport
from llmshrink.sensitivity import costs
from llmshrink.smoke import smoke_recipe
from llmshrink.summary import RunFacts

ENDING = 3.0  # seconds in which the first process says that it ends, once the others miss it

__all__ = [
    "check_gates",
    "check_size",
    "environment",
    "execute",
    "follow",
    "keep",
    "make_plan",
    "measure",
    "smoke",
    "verify",
]


def make_plan(recipe: Recipe) -> Plan:
    """What `execute` would do, without doing it; only an export looks at the weights.

    Of several stages it is the plan of the first: the others depend on what that one makes.

    Raises:
        PlanError: the recipe cannot be carried out on this model.
    """
    if len(stages_of(recipe)) > 1:
        recipe = pipeline.recipes_of(recipe)[0]
    with quiet_libraries(), enough_memory(), memory_limit(recipe.run.memory):
        source, _ = open_model(recipe)
        model, stage = StreamedModel(source, pick_device(recipe.run.device)), writing_stage_of(recipe)
        if isinstance(stage, LoraStage) and not stage.writes_model:
            from llmshrink.adapting import labelled

            rows = labelled(stage, model)
            return adapter_plan(recipe, Adapting(recipe, stage, model, () if rows is None else rows.classes))
        return plan_of(recipe, model)[1]


def execute(
    recipe: Recipe,
    *,
    progress: Progress,
    overwrite: bool = False,
    command: list[str] | None = None,
    resumable: bool = True,
) -> Report:
    """Carry out a recipe.

    Args:
        recipe: what to do.
        progress: told of the steps.
        overwrite: replace an output that llmshrink made.
        command: what the user typed, for the report.
        resumable: the output outlives this call: a signal stops a compression between two blocks.

    Raises:
        GateError: what was written does not verify; it is kept, unfinished.
        InterruptedRun: a signal came; the same call goes on where it was.
        LlmshrinkError: any of the errors of `llmshrink.errors`.
    """
    stages = stages_of(recipe)
    stage = stages[-1] if stages else None
    with _begun(recipe, progress, command, resumable=resumable and stage is not None) as job:
        if len(stages) > 1:
            return pipeline.carry_out(job, overwrite)
        if isinstance(stage, LoraStage) and not stage.writes_model:
            from llmshrink.adapting import adapt

            return adapt(job, stage, overwrite)
        return job.evaluate() if stage is None else job.write(overwrite)


def follow() -> int:
    """Train along with the first of several processes whenever it says so; returns the exit code that it ended with.

    Raises:
        LlmshrinkError: something is wrong in this process alone.
    """
    try:
        for order in ranks.orders():
            recipe = Recipe.model_validate(order["recipe"])
            with suppress(InterruptedRun), _begun(recipe, Silent(), resumable=True) as job:
                _join(job, order)
    except ranks.Dismissed as found:
        code = found.code
    except Exception:
        # A process that trains alone fails for want of the others: the one that ended first says why.
        if (ending := ranks.ended(wait=ENDING)) is None:
            raise
        code = ending
    ranks.leave()
    return code


def _join(job: Job, order: dict[str, Any]) -> None:
    from llmshrink import adapting, distilling

    stage = writing_stage_of(job.recipe)
    if isinstance(stage, LoraStage):
        adapting.join(job, stage, order)
    else:
        distilling.join(job, order)


def keep(recipe: Recipe, *, progress: Progress) -> CacheReport:
    """Write down what the teacher of a distillation says of its text into `cache.folder`, and train nobody.

    Raises:
        InterruptedRun: a signal came; the same call goes on behind the last shard.
        LlmshrinkError: any of the errors of `llmshrink.errors`.
    """
    with _begun(recipe, progress, resumable=True) as job:
        from llmshrink.distilling import keep_words

        return keep_words(job)


def smoke(recipe: Recipe, *, progress: Progress) -> list[Check]:
    """Compress the first block that the recipe treats in a temporary folder, reload, verify: seconds, not hours."""
    if isinstance(writing_stage_of(recipe), CutStage):
        raise UsageError("--smoke tries a method on one block, and a cut has none: --plan says what is left.")
    if isinstance(writing_stage_of(recipe), DistillStage | LoraStage):
        raise UsageError("--smoke tries a method on one block, and training has none: try --max-steps 1.")
    with quiet_libraries(), tempfile.TemporaryDirectory(prefix="llmshrink-smoke-") as name:
        source, _ = open_model(recipe)
        model = StreamedModel(source, torch.device("cpu"))
        work, *_ = plan_of(recipe, model)  # what is refused for the whole model is refused here too
        small = Path(name) / "model"
        small.mkdir()
        treated = [b.index for b in model.anatomy.blocks if any(m in work.methods for m in b.matrices)] or [0]
        sharing = {m for stack in work.stacks[:1] for m in stack}  # what blocks share needs all of them
        last = max([treated[0], *(b.index for b in model.anatomy.blocks if sharing.intersection(b.matrices))])
        truncate(model, small, last + 1)
        cut = smoke_recipe(recipe, work, last, small, Path(name) / "out")
        cut = costs.halfway(cut, StreamedModel(open_source(str(small)), model.device))
        return _stage_checks(execute(cut, progress=progress, resumable=False))


def measure(recipe: Recipe, *, progress: Progress, save: Path | None = None) -> SensitivityReport:
    """Measure what each candidate of a recipe's `allocate` costs in each layer, without choosing any.

    Args:
        recipe: what to measure.
        progress: told of the steps.
        save: a JSON file to write, with a plot beside it.

    Raises:
        OutputError: the file cannot be written.
        PlanError: a candidate cannot be carried out on this model, or there is nothing to choose.
    """
    if save is not None:
        costs.check_place(save)
    with _begun(costs.open_recipe(recipe), progress, resumable=True) as job:
        found = job.measure()
    if save is not None:
        costs.save(found, save)
    return found


def verify(folder: Path, *, progress: Progress) -> list[Check]:
    """Check a finished folder: its files as they were written, every tensor decoded, a foreign reader's logits.

    Raises:
        InputError: it is no output of llmshrink, or not finished.
    """
    with quiet_libraries(), enough_memory():
        return verify_folder(folder.resolve(), progress=progress)


@contextmanager
def _begun(recipe: Recipe, progress: Progress, command: list[str] | None = None, *, resumable: bool) -> Iterator[Job]:
    """A job with the process made ready for it: threads, signals, memory."""
    fix_malloc()
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        base = anonymous_bytes()  # all libraries are imported now
        count = stack.enter_context(threads(recipe.run.threads))
        stop = stack.enter_context(StopSignal(resumable=resumable))
        stack.enter_context(enough_memory())
        stack.enter_context(memory_limit(recipe.run.memory))
        source, embedded = open_model(recipe)
        if ranks.first():
            _ = source.hashes  # a damaged download is refused before any compute
        facts = RunFacts(recipe, source, embedded, pick_device(recipe.run.device), count, base, command)
        yield Job(facts, stop.over(progress), cached=resumable)


def _stage_checks(report: Report) -> list[Check]:
    return [check for stage in report.stages for check in stage.checks]
