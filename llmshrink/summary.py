"""From what a run did to its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llmshrink import __version__, ranks
from llmshrink.calibration.rows import Rows
from llmshrink.engine.compress import Result
from llmshrink.forms import Event
from llmshrink.machine import device_name, versions
from llmshrink.memory import PeakMonitor
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.task import task_of
from llmshrink.plan.schema import Plan
from llmshrink.plan.work import Work, main_method
from llmshrink.recipe.load import complete, decisive, recipe_hash
from llmshrink.recipe.schema import Recipe
from llmshrink.redact import redact_data
from llmshrink.report.schema import (
    BY_RULE,
    CalibrationReport,
    Check,
    EventRecord,
    LayerReport,
    MemoryReport,
    ModelInfo,
    ModelMeasure,
    Report,
    RuntimeSupport,
    StageReport,
)


@dataclass(frozen=True)
class RunFacts:
    """What is fixed when a run starts."""

    recipe: Recipe
    source: Source
    embedded: bool
    device: torch.device
    threads: int
    base_bytes: int  # anonymous memory after the imports
    command: list[str] | None  # as it was typed

    @property
    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data."""
        return plain(self.recipe)

    def identity(self, rows: Rows | None, trained_on: str | None = None) -> dict[str, Any]:
        """Everything that decides the bytes of the result; two runs may share a journal only if it is equal.

        Not the size of batches, which the journal holds for each block: a run that was short of memory may go on with
        smaller ones. `trained_on` is the fingerprint of the rows to learn from.
        """
        decides = decisive(self.recipe)
        return {
            "recipe": {k: decides[k] for k in ("stages", "calibration")},
            "run": {"sequential": decides["run"]["sequential"]},
            "model": self.source.hashes,
            "calibration": rows.fingerprint if rows is not None else None,
            "training": trained_on,
            "versions": versions(),
            "device": device_name(self.device),
            "threads": self.threads,
            "processes": ranks.count(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }

    def report(
        self,
        *,
        stages: list[StageReport],
        calibration: Rows | None,
        measures: dict[str, ModelMeasure],
        events: list[Event],
        output: str | None,
        seconds: float,
    ) -> Report:
        """The report of the whole run; `measures` holds `before` and, after a compression, `after`."""
        task = task_of(self.source.config)
        report = Report(
            llmshrink_version=__version__,
            command=self.command,
            recipe=self.resolved,
            recipe_hash=recipe_hash(self.recipe),
            model=ModelInfo(
                id=self.source.id,
                source="embedded" if self.embedded else "hub" if self.source.commit else "folder",
                commit=self.source.commit,
                files=self.source.hashes,
                architecture=next(iter(self.source.config.architectures or []), None),
                task=task.name,
                auto_class=task.auto,
                licence=self.source.licence,
            ),
            versions=versions(),
            device=device_name(self.device),
            seed=self.recipe.calibration.seed,
            threads=self.threads,
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            calibration=_calibration(calibration),
            stages=stages,
            before=measures.get("before"),
            after=measures.get("after"),
            events=[EventRecord.model_validate(event) for event in events],
            output=output,
            seconds=seconds,
        )
        return Report.model_validate(redact_data(report.model_dump(mode="json")))


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as data, with every default written out and without secrets."""
    data: dict[str, Any] = redact_data(complete(recipe))
    return data


def _calibration(rows: Rows | None) -> CalibrationReport | None:
    if rows is None:
        return None
    return CalibrationReport(
        data=rows.data,
        origin=rows.origin,
        fingerprint=rows.fingerprint,
        rows=len(rows.tokens),
        length=rows.length,
        tokens=rows.count,
    )


def writing_stage(
    work: Work,
    plan: Plan,
    result: Result,
    checks: list[Check],
    memory: PeakMonitor,
    written: StreamedModel,
    seconds: float,
) -> StageReport:
    """What a stage that writes a model did, from the plan, the engine's result and the files."""
    first = main_method(work.methods)
    return StageReport(
        task=first.task,
        method={"name": plan.method, **first.config.model_dump(mode="json")},
        format=work.format.name,
        type=work.mix,
        layers=[*result.layers, *_left(plan)],
        transforms=result.transforms,
        blocks=result.blocks,
        tuned=result.tuned,
        packed=result.packed,
        bytes_before=plan.bytes_before,
        bytes_after=written.source.checkpoint.bytes,
        planned_bytes_after=plan.bytes_after,
        bits_per_weight=8 * written.source.checkpoint.bytes / plan.parameters,
        seconds={"compress_stage": seconds, **result.seconds},
        resumed_blocks=result.resumed,
        memory=MemoryReport(
            planned_bytes=plan.memory_bytes,
            measured_bytes=memory.above_base_bytes,
            device_bytes=memory.device_bytes,
        ),
        checks=checks,
        loads_in=_loads_in(plan, checks),
    )


def rounding(work: Work, result: Result) -> list[Event]:
    """What an export changed: nothing, or weights and scales rounded to a dtype of the new format."""
    changed = [layer for layer in result.layers if layer.relative_error]
    if main_method(work.methods).task != "export" or not changed:
        return []
    worst = max(layer.relative_error or 0.0 for layer in changed)
    message = f"{len(changed)} layers are rounded to what {work.format.name} stores, by up to {worst:.1e} of their norm"
    return [Event("rounded", message, data={"relative_error": worst})]


def _left(plan: Plan) -> list[LayerReport]:
    """Matrices that stay as they are."""
    layers = [layer for layer in plan.layers if layer.method is None]
    return [
        LayerReport(
            name=layer.name,
            shape=layer.shape,
            method=None,
            form="Dense",
            format="dense",
            parameters=layer.parameters,
            bytes_before=layer.bytes_before,
            bytes_after=layer.bytes_after,
            bits_per_weight=8 * layer.bytes_after / layer.parameters,
            reason=layer.reason,
        )
        for layer in layers
    ]


def eval_stage(model: StreamedModel, seconds: float) -> StageReport:
    """One eval stage: the measures themselves are `before` and `after` of the report."""
    checkpoint = model.source.checkpoint
    return StageReport(
        task="eval",
        format=model.weights.format.name,
        bytes_before=checkpoint.bytes,
        bytes_after=checkpoint.bytes,
        bits_per_weight=8 * checkpoint.bytes / model.parameters,
        seconds={"evaluate": seconds},
    )


def _loads_in(plan: Plan, checks: list[Check]) -> list[RuntimeSupport]:
    """What the table says of this output; transformers' line is proved by the check that loaded it."""
    loaded = any(check.name == "reader" and check.passed for check in checks)
    return [
        RuntimeSupport(
            runtime=line.runtime,
            support=line.support,
            reason=line.reason,
            proof="check 'reader'" if loaded and line.runtime == "transformers" else f"{BY_RULE}: {line.source}",
        )
        for line in plan.loads_in
    ]
