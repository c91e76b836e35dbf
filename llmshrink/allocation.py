"""From a size that is asked for to the settings of every layer: what is measured, what is chosen, what is told."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmshrink.calibration.rows import Rows
from llmshrink.evaluate.kept import Kept
from llmshrink.evaluate.sensitivity import Sensitivity
from llmshrink.forms import Event
from llmshrink.plan.choices import Assignment, Choices
from llmshrink.plan.economy import Economy
from llmshrink.progress import Progress
from llmshrink.recipe.load import decisive
from llmshrink.report.schema import AllocationReport, UnitReport
from llmshrink.summary import RunFacts


def costs(
    choices: Choices, rows: Rows, facts: RunFacts, *, economy: Economy, folder: Path, cached: bool, progress: Progress
) -> tuple[list[list[float]], list[Event]]:
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
    place = _cache() if cached else folder
    if place is None:
        place = folder
        events.append(
            Event("not_cached", "the costs of the candidates cannot be kept: another size measures them again")
        )
    kept = Kept(place, _identity(facts, rows, choices))
    found = Sensitivity(choices, rows, economy=economy, folder=folder, kept=kept, progress=progress).measure()
    if kept.found:
        events.append(Event("cached", f"the costs of {kept.found} parts were measured before: taken from {place}"))
    return found, events


def told(choices: Choices, assignment: Assignment, found: list[list[float]], size: int) -> AllocationReport:
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


def units(choices: Choices, found: list[list[float]], assignment: Assignment | None = None) -> list[UnitReport]:
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
    (stage,) = [stage for stage in decisive(facts.recipe)["stages"] if stage["task"] == "quantize"]
    spec = {key: value for key, value in stage["allocate"].items() if key not in ("size", "bpw", "candidates")}
    kept = {key: value for key, value in stage.items() if key not in ("allocate", "reconstruct")}
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
