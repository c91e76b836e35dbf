"""Runs of several stages: each begins with what the one before wrote, and all are compared with the model at first.

A stage is a run of its own in the folder of work, with a journal of its own: whatever ends a pipeline, the same command
goes on in the stage, and at the block, where it was. What the last stage wrote becomes the output.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink.checks.gates import failed_gates
from llmshrink.checks.preflight import check_finite
from llmshrink.engine.workspace import MANIFEST, Workspace, whole
from llmshrink.errors import GateError, OutputError, PlanError
from llmshrink.forms import Event
from llmshrink.io.files import copy_file
from llmshrink.memory import release
from llmshrink.model.source import Source, open_source
from llmshrink.output import write_report
from llmshrink.plan.layout import default_output
from llmshrink.planning import Writing, plan_of, stages_of
from llmshrink.progress import Progress
from llmshrink.recipe.lora import LoraStage
from llmshrink.recipe.schema import ModelSpec, Recipe
from llmshrink.recipe.stages import Stage
from llmshrink.report.schema import EventRecord, Report, StageReport

if TYPE_CHECKING:
    from llmshrink.job import Job

TOLD = (MANIFEST, "README.md", "recipe.yaml", "report.json")  # of each stage: the pipeline has its own


def carry_out(job: Job, overwrite: bool) -> Report:
    """Carry out the stages of a recipe one behind the other.

    Raises:
        PlanError: a stage writes no model that the next could begin with.
        GateError: what a stage made does not keep to its gate; it is kept, unfinished.
    """
    parts = recipes_of(job.recipe)
    names = [f"{number}-{stages_of(part)[0].task}" for number, part in enumerate(parts, 1)]
    what = "-".join(stages_of(part)[0].task for part in parts)
    output = Path(job.recipe.output or default_output(job.model.source.id, what)).expanduser()
    plan_of(parts[0], job.model)  # what is refused is refused before anything is made
    with Workspace(output, overwrite=overwrite) as workspace:
        check_finite(job.model, job.progress)
        folders = {folder for name in names for folder in (name, f"{name}.partial")}
        workspace.begin(job.facts.identity(None), resume=job.recipe.run.resume, folders=folders)
        reports, source = list[Report](), job.facts.source
        for name, part in zip(names, parts, strict=True):
            folder = workspace.work / name
            progress = _Named(job.progress, f"stage {name[0]} of {len(parts)}")
            reports.append(_stage(job, part, source, folder, workspace, progress))
            source = open_source(str(folder))
        _take(workspace.work / names[-1], workspace.folder)
        report = _told(job, reports, workspace.events, output)
        write_report(workspace.folder, report, job.recipe)
        if job.recipe.run.keep:
            _keep(workspace, names[:-1])
        workspace.commit()
    return report


def recipes_of(recipe: Recipe) -> list[Recipe]:
    """A recipe for each stage that writes a model, with the `eval` stages behind it.

    Raises:
        PlanError: one of them is no model, and something follows.
    """
    parts: list[list[Stage]] = []
    for number, stage in enumerate(recipe.stages):
        if not parts or (isinstance(stage, Writing) and any(isinstance(one, Writing) for one in parts[-1])):
            parts.append([])
        parts[-1].append(stage)
        if isinstance(stage, LoraStage) and not stage.writes_model:
            raise PlanError(
                f"stages[{number}]: an adapter is no model that other stages could go on with.",
                hint="Give the stage `merge: true`, or run it alone by `llmshrink lora`.",
            )
    return [recipe.model_copy(update={"stages": part}) for part in parts]


def _stage(job: Job, part: Recipe, source: Source, folder: Path, workspace: Workspace, progress: Progress) -> Report:
    """What one stage makes of a model, unless it did so before; with the verdicts of its gates as they are now."""
    model = part.model if source is job.facts.source else ModelSpec(id=str(source.folder))
    release(job.facts.device)
    own = job.aside(part.model_copy(update={"model": model, "output": str(folder)}), source, progress)
    if folder.is_dir() and not whole(folder):
        workspace.events.append(Event("work_lost", f"{folder.name} is damaged: the stage is done again"))
        shutil.rmtree(folder)
    if folder.is_dir():
        report = own.judged_again(Report.model_validate_json((folder / "report.json").read_bytes()), folder)
    else:
        report = own.write(overwrite=False)
    if failed := failed_gates(report):
        shown = "\n".join(f"  - {line}" for line in failed)
        raise GateError(
            f"stage {folder.name}: {len(failed)} gate{'s' * (len(failed) > 1)} failed; what was made is in {folder}:\n"
            f"{shown}",
            hint="With another gate the same command goes on behind this stage.",
        )
    return report


@dataclass
class _Named:
    """A listener that is told which stage a step is of."""

    progress: Progress
    name: str

    def start(self, step: str, total: int, done: int = 0) -> None:
        """As of `Progress`."""
        self.progress.start(f"{self.name}: {step}", total, done)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.progress, name)


def _take(folder: Path, into: Path) -> None:
    """What the last stage wrote, but for what is told of it."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in TOLD and not name.startswith("loss."):
            _link(path, into / name)


def _keep(workspace: Workspace, names: list[str]) -> None:
    """Put what stages before the last wrote beside the output, too."""
    for name in names:
        place = workspace.output.with_name(f"{workspace.output.name}-{name}")
        if place.exists() and not (place / MANIFEST).exists():
            raise OutputError(
                f"{place} is there already and was not made by llmshrink: it is left as it is.",
                hint="Move it away, or leave out run.keep.",
            )
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(workspace.work / name, place, copy_function=_link)


def _link(path: str | Path, place: str | Path) -> None:
    """The same file at another place; a copy where the file system has no links."""
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).unlink(missing_ok=True)
    try:
        os.link(path, place)
    except OSError:
        copy_file(Path(path), Path(place))


def _told(job: Job, reports: list[Report], lost: list[Event], output: Path) -> Report:
    """One report of all stages."""
    stages: list[StageReport] = []
    for report in reports:
        first, *others = report.stages
        stages += [first.model_copy(update={"after": report.after}), *others]
    events = [EventRecord.model_validate(event) for event in lost]
    for number, report in enumerate(reports, 1):
        events += [event.model_copy(update={"stage": number}) for event in report.events]
    found = job.facts.report(
        stages=stages,
        calibration=None,
        measures={},
        events=[],
        output=str(output.resolve()),
        seconds=sum(report.seconds for report in reports),
    )
    calibration = next((report.calibration for report in reports if report.calibration is not None), None)
    ends = {"before": reports[0].before, "after": reports[-1].after}
    return found.model_copy(update={**ends, "events": events, "calibration": calibration})
