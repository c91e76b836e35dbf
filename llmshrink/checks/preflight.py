"""What would fail in the middle of a run, refused before any compute: room, memory, damaged weights."""

from __future__ import annotations

from pathlib import Path

import torch

from llmshrink.engine.budget import LIBRARIES, memory_there
from llmshrink.errors import InputError, OutputError, ResourceError
from llmshrink.forms import finite
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.schema import Plan
from llmshrink.progress import Progress
from llmshrink.recipe.schema import RunSpec

EVALUATION_ROWS = "--set evaluation.rows=N --set evaluation.length=N"


def check_room(plan: Plan, output: Path, source: Source, run: RunSpec) -> None:
    """Refuse before compute what would fail for lack of room, or would write over the source."""
    target = output.resolve()
    partial = target.with_name(target.name + ".partial")
    if any(p == source.folder or source.folder in p.parents or p in source.folder.parents for p in (target, partial)):
        raise OutputError(f"The output {output} and the model {source.folder} lie within each other.")
    if plan.disk_bytes > plan.disk_free:
        raise ResourceError(
            f"{output} needs {plan.disk_bytes / 2**20:.1f} MiB of disk, and {plan.disk_free / 2**20:.1f} are free.",
            hint="Free some, or choose an --output on another disk.",
        )
    check_memory("compress", plan.memory_bytes, run, "--samples, --length")
    check_memory("compare both models", plan.evaluation_bytes, run)


def check_memory(what: str, needed: int, run: RunSpec, rows: str = EVALUATION_ROWS) -> None:
    """Refuse what does not fit, though everything was done to save memory that the recipe lets be done.

    Raises:
        ResourceError: not enough memory, or too small a budget.
    """
    free = max(0, memory_there(run))
    if needed <= free:
        return
    tight = run.memory is not None and run.memory - LIBRARIES <= free
    there = "are within --memory" if tight else "are there"
    hint = f"Use fewer or shorter rows: {rows}"
    if tight:
        hint += (
            f"; or give --memory {(needed + LIBRARIES) / 2**20 + 1:.0f}MiB, of which libraries take {LIBRARIES >> 20}"
        )
    elif run.memory is None:
        hint += f"; or let batches be smaller too: --memory {(free + LIBRARIES) >> 20}MiB"
    message = f"About {needed / 2**20:.0f} MiB of memory are needed to {what}, and {free / 2**20:.0f} {there}."
    raise ResourceError(message, hint=f"{hint}.")


def check_finite(model: StreamedModel, progress: Progress) -> None:
    """Read every weight once and refuse NaN and infinity before any compute."""
    infos = model.weights.infos
    progress.start("check the weights", sum(info.numel for info in infos.values()))
    for key, info in infos.items():
        tensor = model.weights.get(key)
        if not finite(tensor):
            bad = (~torch.isfinite(tensor)).flatten().nonzero()
            raise InputError(
                f"{model.source.folder / info.file}: tensor {key!r} has {len(bad)} values that are NaN or infinite "
                f"(the first at index {int(bad[0])}).",
                hint="The file is damaged, or the model was saved broken: download it again.",
            )
        progress.advance(info.numel)
    progress.finish()
