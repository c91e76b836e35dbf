"""What would fail in the middle of a run, refused before any compute: room, memory, damaged weights."""

from __future__ import annotations

from pathlib import Path

import torch

from llmshrink.engine.budget import LIBRARIES
from llmshrink.errors import InputError, OutputError, ResourceError
from llmshrink.memory import available_memory
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.schema import Plan
from llmshrink.progress import Progress


def check_room(plan: Plan, output: Path, source: Source, budget: int | None) -> None:
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
    _check_memory("compress", plan.memory_bytes, budget, "--samples, --length")
    rows = "--set evaluation.rows=N --set evaluation.length=N"
    _check_memory("compare both models", plan.evaluation_bytes, budget, rows)


def _check_memory(what: str, needed: int, budget: int | None, rows: str) -> None:
    """Refuse what does not fit, though everything was done to save memory that may be done unasked."""
    free = available_memory()
    if budget is not None:
        free = min(free, budget - LIBRARIES)
    if needed <= free:
        return
    smaller = "a smaller --memory than there is also makes batches smaller" if budget is None else "a larger --memory"
    raise ResourceError(
        f"About {needed / 2**20:.0f} MiB of memory are needed to {what}, and {max(free, 0) / 2**20:.0f} are there"
        + ("." if budget is None else f" (--memory, less {LIBRARIES / 2**20:.0f} MiB for libraries)."),
        hint=f"Use fewer or shorter rows: {rows}; {smaller}.",
    )


def check_finite(model: StreamedModel, progress: Progress) -> None:
    """Read every weight once and refuse NaN and infinity before any compute."""
    infos = model.weights.infos
    progress.start("check the weights", sum(info.numel for info in infos.values()))
    for key, info in infos.items():
        tensor = model.weights.get(key)
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(value) for value in torch.aminmax(tensor))
            if not abs(low) + abs(high) < float("inf"):
                bad = (~torch.isfinite(tensor)).flatten().nonzero()
                raise InputError(
                    f"{model.source.folder / info.file}: tensor {key!r} has {len(bad)} values that are NaN or infinite "
                    f"(the first at index {int(bad[0])}).",
                    hint="The file is damaged, or the model was saved broken: download it again.",
                )
        progress.advance(info.numel)
    progress.finish()
