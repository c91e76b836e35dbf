"""From a size that is asked for to the settings of every layer: what is measured, what is chosen, what is told."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmshrink.calibration.rows import Rows
from llmshrink.errors import OutputError
from llmshrink.forms import Event
from llmshrink.io.files import disk_faults, sealed, unsealed, write_bytes
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.choices import Assignment, Choices
from llmshrink.plan.economy import Economy
from llmshrink.progress import Progress
from llmshrink.recipe.allocate import AllocateSpec
from llmshrink.recipe.load import decisive
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import MatrixStage
from llmshrink.report.schema import AllocationReport, EventRecord, SensitivityReport, UnitReport
from llmshrink.report.sensitivity import plot
from llmshrink.sensitivity.kept import Kept
from llmshrink.sensitivity.measure import Sensitivity
from llmshrink.summary import RunFacts

NOT_MEASURED = ("allocate", "transform", "reconstruct", "tune")  # of a stage: candidates are what the method makes
CHOSEN = "allocation.json"  # in the folder of work
Costs = list[list[float]]  # of each option of each unit


def costs(
    choices: Choices, rows: Rows, facts: RunFacts, *, economy: Economy, folder: Path, cached: bool, progress: Progress
) -> tuple[Costs, list[Event]]:
    """What each option of each unit costs, measured or found where it was kept; and what to tell of that.

    Args:
        choices: what is measured.
        rows: calibration text.
        facts: of the run.
        economy: how much is in memory at a time.
        folder: of the run's work, for what is not kept longer.
        cached: keep the costs for other runs.
        progress: told of the steps.
    """
    events = []
    place = (_cache() if cached else folder) or folder
    kept = Kept(place, _identity(facts, rows, choices), spare=folder)
    found = Sensitivity(choices, rows, economy=economy, folder=folder, kept=kept, progress=progress).measure()
    if kept.found:
        events.append(Event("cached", f"the costs of {kept.found} parts were measured before: taken from {place}"))
    if cached and kept.folder == folder:
        message = "the costs of the candidates cannot be kept: another size measures them again"
        events.append(Event("not_cached", message))
    return found, events


def choose(
    choices: Choices, rows: Rows, facts: RunFacts, *, economy: Economy, folder: Path, cached: bool, progress: Progress
) -> tuple[Assignment, Costs, list[Event]]:
    """What every unit gets, what each option costs, and what to tell; nothing is measured where all is decided.

    A run that goes on keeps to what it chose: parts that are done were made so.
    """
    if choices.decided is not None:
        return choices.decided, [], []
    path = folder / CHOSEN
    if path.is_file() and (kept := unsealed(path.read_bytes())) is not None:
        return kept["chosen"], kept["costs"], [Event(**event) for event in kept["events"]]
    found, events = costs(choices, rows, facts, economy=economy, folder=folder, cached=cached, progress=progress)
    chosen = list(choices.assign(found))
    write_bytes(path, sealed({"chosen": chosen, "costs": found, "events": [vars(event) for event in events]}))
    return chosen, found, events


def halfway(recipe: Recipe, model: StreamedModel) -> Recipe:
    """The recipe with the size between the smallest and the largest of this model; as it is where it asks for none."""
    stage = next((stage for stage in recipe.stages if isinstance(stage, MatrixStage)), None)
    if stage is None or stage.allocate is None:
        return recipe
    choices = Choices(recipe, stage, model)
    bpw = 4 * (choices.smallest + choices.largest) / model.parameters
    return _with(recipe, stage.allocate.model_copy(update={"bpw": bpw}))


def open_recipe(recipe: Recipe) -> Recipe:
    """The recipe with choices to measure, where it has none."""
    stage = next(stage for stage in recipe.stages if isinstance(stage, MatrixStage))
    return _with(recipe, stage.allocate or AllocateSpec())


def _with(recipe: Recipe, spec: AllocateSpec) -> Recipe:
    stages = [
        stage.model_copy(update={"allocate": spec}) if isinstance(stage, MatrixStage) else stage
        for stage in recipe.stages
    ]
    return recipe.model_copy(update={"stages": stages})


def sensitivities(choices: Choices, found: Costs, events: list[Event]) -> SensitivityReport:
    """What was measured, where nothing is chosen."""
    return SensitivityReport(
        model=choices.model.source.id,
        score=choices.spec.score,
        candidates=choices.candidates,
        units=units(choices, found),
        events=[EventRecord.model_validate(event) for event in events],
    )


def check_place(path: Path) -> None:
    """Refuse before hours of measuring what could not be written after them.

    Raises:
        OutputError: the folder is not there, or nothing can be written in it.
    """
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written.", hint="Name a file in a folder that is there.")


def save(report: SensitivityReport, path: Path) -> None:
    """Write a report as JSON, and its plot beside it."""
    with disk_faults(path, 0):
        write_bytes(path, (report.model_dump_json(indent=2) + "\n").encode())
        write_bytes(path.with_name(f"{path.name}.svg"), plot(report).encode())


def told(choices: Choices, assignment: Assignment, found: Costs, size: int) -> AllocationReport:
    """What was chosen among what, as the report has it."""
    spec = choices.spec
    chosen = [unit.options.index(c) for unit, c in zip(choices.units, assignment, strict=True)]
    return AllocationReport(
        asked_bytes=choices.limit,
        asked_bits_per_weight=spec.bpw,
        bytes=size,
        score=spec.score if found else None,
        predicted=sum(row[i] for row, i in zip(found, chosen, strict=True)) if found else None,
        candidates=choices.candidates,
        units=units(choices, found, assignment),
    )


def units(choices: Choices, found: Costs, assignment: Assignment | None = None) -> list[UnitReport]:
    """What was measured of each unit."""
    return [
        UnitReport(
            layers=unit.name,
            candidates=list(unit.options),
            bytes=sizes,
            scores=found[i] if found else [],
            chosen=None if assignment is None else assignment[i],
        )
        for i, (unit, sizes) in enumerate(zip(choices.units, choices.sizes, strict=True))
    ]


def _identity(facts: RunFacts, rows: Rows, choices: Choices) -> dict[str, Any]:
    """All that decides the costs: not the size, nor what follows the method."""
    (stage,) = [stage for stage in decisive(facts.recipe)["stages"] if "allocate" in stage]
    spec = {key: value for key, value in stage["allocate"].items() if key not in ("size", "bpw", "candidates")}
    kept = {key: value for key, value in stage.items() if key not in NOT_MEASURED}
    run = {key: value for key, value in facts.identity(rows).items() if key not in ("recipe", "run")}
    return {**run, "stage": kept, "measure": spec, "candidates": choices.candidates}


def _cache() -> Path | None:
    """The folder of what is kept for other runs, by the XDG base directory specification; None: nothing can be."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "llmshrink"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None
