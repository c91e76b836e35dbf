"""Runs that adapt: learn, and read back, measure and report an adapter, or hand on a whole model to be written."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from llmshrink import ranks
from llmshrink.calibration.labelled import Labelled, read_labelled
from llmshrink.calibration.rows import Rows
from llmshrink.checks.adapter import check_adapter, check_tensors
from llmshrink.checks.gates import check_size
from llmshrink.checks.preflight import check_finite, check_room
from llmshrink.checks.written import OUTPUT_TOLERANCE, check_hashes, probe_tokens
from llmshrink.engine.workspace import Workspace
from llmshrink.errors import GateError, PlanError
from llmshrink.evaluate.adapted import score_adapted
from llmshrink.forms import Event
from llmshrink.io.files import copy_file, disk_faults
from llmshrink.io.safetensors import Checkpoint, read_header
from llmshrink.memory import PeakMonitor, release
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.output import write_report
from llmshrink.plan.adapting import Adapting
from llmshrink.plan.describe_adapter import FORMAT
from llmshrink.plan.layout import row_length
from llmshrink.plan.schema import Plan
from llmshrink.plan.steps import Steps
from llmshrink.plan.work import Work
from llmshrink.planning import adapter_plan, planned
from llmshrink.recipe.adapter import WRITES_MODEL
from llmshrink.recipe.lora import LoraStage
from llmshrink.report.schema import (
    AdapterReport,
    Check,
    MemoryReport,
    ModelMeasure,
    Report,
    StageReport,
    TextScore,
    TrainReport,
)
from llmshrink.train.adaptation import (
    ADAPTER,
    BASE,
    CLASSES,
    MERGE,
    PROBE,
    SETTINGS,
    Adaptation,
    Merged,
    Whole,
    accuracy,
    load_adapted,
)
from llmshrink.train.base import load_base
from llmshrink.train.classes import Classified
from llmshrink.train.data import Examples, Lines
from llmshrink.train.folders import STATES, TEXT, TRAINED
from llmshrink.train.lesson import Lesson
from llmshrink.train.merging import Merge
from llmshrink.train.overlap import overlaps
from llmshrink.train.prepare import chosen
from llmshrink.train.run import count, finished, train, unlearned

if TYPE_CHECKING:
    from llmshrink.job import Job


def adapt(job: Job, stage: LoraStage, overwrite: bool) -> Report:
    """Learn an adapter, verify, measure, commit.

    Raises:
        GateError: what was written does not verify; it is kept, unfinished.
    """
    rows = labelled(stage, job.model)
    classes = () if rows is None else rows.classes
    return _Run(job, Adapting(job.recipe, stage, job.model, classes), rows).write(overwrite)


def labelled(stage: LoraStage, model: StreamedModel) -> Labelled | None:
    """Rows with classes, where a stage learns these."""
    if stage.label is None:
        return None
    spec = stage.train
    if spec.data in ("auto", "self", "generator"):
        raise PlanError(f"train.data: {spec.data} has no classes.", hint="Name a file or a dataset that has: --data.")
    known = tuple(model.source.config.id2label.values()) if model.task.by_row else ()
    return read_labelled(
        spec.data,
        model.source.tokenizer,
        label=stage.label,
        text=spec.column,
        length=Steps(spec, model).length,
        split=spec.split,
        seed=spec.seed,
        known=known,
    )


def learn_model(
    job: Job, adapting: Adapting, examples: Lines, workspace: Workspace, done: list[dict[str, Any]]
) -> tuple[Work, Plan, dict[str, Any]]:
    """Let a model learn, and plan to write it as a whole; also what the report says of that.

    Raises:
        GateError: the model with the adapter in its weights is another one than with it beside them.
    """
    trained, report = learn(job, adapting, examples, workspace, done)
    written = StreamedModel(Source(job.model.source.id, trained, job.model.source.commit), job.facts.device)
    work = adapting.work(written)
    work.events += unlearned(report)
    found: dict[str, Any] = {"task": "lora", "method": _settings(adapting), "trained": report, "checks": []}
    found["adapter"] = _told(adapting, report, 0)
    if adapting.stage.merge:
        merged = Merge(**json.loads((trained / MERGE).read_bytes()))
        found["checks"] = [_check_merge(merged)]
        work.events += masked(merged)
    return work, planned(job.recipe, job.model, work, adapting), found


def _check_merge(found: Merge) -> Check:
    limit = OUTPUT_TOLERANCE * max(1.0, found.spread)
    detail = (
        f"merged, in float32, and side by side: max |difference| of logits {found.merged:.2e}, allowed {limit:.0e}; "
        f"as it is stored {found.rounded:.2e}"
    )
    if not found.merged <= limit:
        raise GateError(f"The adapter in the weights is not the one that learned beside them: {detail}.")
    return Check(name="merged", passed=True, detail=detail, value=found.merged)


def masked(found: Merge) -> list[Event]:
    """What to tell of weights that were pruned and stay zero, whatever an adapter put there."""
    if found.masked is None:
        return []
    message = f"{found.zeros:,} weights that were pruned stay zero; without what the adapter put there logits move by"
    return [Event("masked", f"{message} up to {found.masked:.2g}, of a spread of {found.spread:.2g}")]


def learn(
    job: Job, adapting: Adapting, examples: Lines, workspace: Workspace, done: list[dict[str, Any]]
) -> tuple[Path, TrainReport]:
    """Learn, unless this run did so before it was interrupted; the folder of what was learned."""
    if (before := finished(workspace, done)) is not None:
        return before
    if ranks.count() > 1:
        ranks.tell({"recipe": json.loads(job.recipe.model_dump_json()), "text": examples.told.fingerprint})
    return _learn(job, adapting, examples, workspace, done)


def join(job: Job, stage: LoraStage, order: dict[str, Any]) -> None:
    """Learn along with the process that holds the workspace and gave this order.

    Raises:
        OutputError: it does not see the same text.
    """
    rows = labelled(stage, job.model)
    adapting = Adapting(job.recipe, stage, job.model, () if rows is None else rows.classes)
    workspace = Workspace(adapting.output)  # never entered: nothing is written by it
    examples = Examples.load(workspace.work / TEXT, None) if rows is None else Classified(rows)
    _learn(job, adapting, chosen(examples, order["text"]), workspace, [])


def _learn(
    job: Job, adapting: Adapting, examples: Lines, workspace: Workspace, done: list[dict[str, Any]]
) -> tuple[Path, TrainReport]:
    steps, device = adapting.steps, job.facts.device
    lesson: Lesson
    if adapting.name in WRITES_MODEL:
        lesson = Whole(adapting)
    else:
        kind = Merged if adapting.stage.merge else Adaptation
        lesson = kind(adapting, device, steps=count(steps, examples), probe=probe_tokens(job.model))
    return train(lesson, steps, examples, workspace=workspace, done=done, device=device, progress=job.progress)


def _settings(adapting: Adapting) -> dict[str, Any]:
    return adapting.stage.method.model_dump(mode="json", exclude_none=True)


def _told(adapting: Adapting, trained: TrainReport, size: int) -> AdapterReport:
    return AdapterReport(
        name=adapting.name,
        learns=trained.parameters,
        share=trained.parameters / adapting.model.parameters,
        bytes=size,
        targets=list(adapting.targets),
        four_bits=adapting.in_four_bits,
    )


class _Run:
    def __init__(self, job: Job, adapting: Adapting, rows: Labelled | None) -> None:
        self.job, self.adapting, self._labelled = job, adapting, rows
        self.recipe, self.model, self.device = job.recipe, job.model, job.facts.device

    def write(self, overwrite: bool) -> Report:
        if self.recipe.evaluation.baseline is not None:
            raise PlanError("evaluation.baseline is for `llmshrink eval`: this command compares with the original.")
        job, adapting, output = self.job, self.adapting, self.adapting.output
        plan = adapter_plan(self.recipe, adapting)
        check_size(plan)
        check_room(plan, output, job.facts.source, self.recipe.run)
        with disk_faults(output, plan.disk_bytes), Workspace(output, overwrite=overwrite) as workspace:
            check_finite(self.model, job.progress)
            examples, made = self._examples(workspace)
            length = row_length(self.recipe.evaluation.length, self.model, adapting.events)
            spec = self.recipe.evaluation.model_copy(update={"data": []} if adapting.classes else {})
            texts = job.loader.evaluation(spec, adapting.shorter(length), None)
            if isinstance(examples, Examples):
                job.loader.events += overlaps(examples, texts)
            identity, kept = job.facts.identity(None, examples.told.fingerprint), (STATES, TRAINED, TEXT)
            done = workspace.begin(identity, resume=self.recipe.run.resume, folders=kept, made=made)
            if isinstance(examples, Examples):
                examples = examples.moved(workspace.work / TEXT)
            with PeakMonitor(self.device, base=job.facts.base_bytes) as memory:
                trained, report = learn(job, adapting, examples, workspace, done)
            adapting.events += unlearned(report)
            job.tell(workspace.events, adapting.events, job.loader.events)
            files = self._files(workspace, trained)
            checks = self._verify(workspace, trained, files, plan)
            measures, seconds = self._measure(workspace.folder, texts)
            done_so = self._stage(plan, workspace.folder, report, checks, memory, seconds)
            own = [workspace.folder / ADAPTER, *(workspace.folder / BASE).glob("*.safetensors")]
            size = sum(path.stat().st_size for path in own)
            found = job.facts.report(
                stages=job._judged([done_so], {"before": self.model}, measures, size),
                calibration=None,
                measures=measures,
                events=[*workspace.events, *adapting.events, *job.loader.events],
                output=str(output),
                seconds=time.perf_counter() - job.start,
            )
            write_report(workspace.folder, found, self.recipe)
            workspace.commit()
        return found

    def _examples(self, workspace: Workspace) -> tuple[Lines, tuple[str, ...]]:
        """What is learned from, and the new folder that it lies in, below that of work."""
        if self._labelled is not None:
            return Classified(self._labelled), ()
        found = self.job.examples(self.adapting.steps, workspace)
        return found, (found.folder.name,)

    def _files(self, workspace: Workspace, trained: Path) -> dict[str, str]:
        """Copy what was learned, and the tokenizer, into the result; returns the SHA-256 of each file."""
        source = self.model.source
        found = {name: path for name, path in source.companions.items() if "/" not in name}
        found |= {name: trained / name for name in (ADAPTER, SETTINGS)}
        found |= {CLASSES: trained / CLASSES} if self.adapting.classes else {}
        found |= {path.relative_to(trained).as_posix(): path for path in sorted((trained / BASE).glob("*"))}
        (workspace.folder / BASE).mkdir() if (trained / BASE).is_dir() else None
        return {name: copy_file(path, workspace.folder / name) for name, path in found.items()}

    def _verify(self, workspace: Workspace, trained: Path, files: dict[str, str], plan: Plan) -> list[Check]:
        job, folder = self.job, workspace.folder
        own = (folder / BASE).is_dir()
        job.progress.start("verify", 0)
        assert plan.adapter is not None
        checks = [
            check_hashes(folder, files),
            check_tensors(_tensors(folder), plan.adapter.bytes, at_most=plan.adapter.at_most),
            check_adapter(
                folder / BASE if own else self.model.source.folder,
                folder,
                probe_tokens(self.model),
                load_file(trained / PROBE)["logits"],
                room=self.model.parameters * 4,
                nested=None if own else self.adapting.nested,
                classes=len(self.adapting.classes) or None,
            ),
        ]
        if checks[-1].passed is None:
            job.loader.events.append(Event("not_verified", f"no foreign reader: {checks[-1].detail}"))
        job.progress.finish()
        if failed := [check for check in checks if check.passed is False]:
            shown = "\n".join(f"  - {check.name}: {check.detail}" for check in failed)
            raise GateError(f"What was written does not verify; it stays in {folder}:\n{shown}")
        return checks

    def _measure(self, folder: Path, texts: list[Rows]) -> tuple[dict[str, ModelMeasure], float]:
        """The model without what it learned, and with it, in memory once."""
        clock = time.perf_counter()
        scores: tuple[list[TextScore], list[TextScore]] = ([], [])
        if texts:
            model = load_adapted(self.adapting, folder, self.device)
            original = load_base(self.model.source, self.device) if self.adapting.in_four_bits else None
            scores = score_adapted(
                model,
                original,
                texts,
                packed=self.recipe.evaluation.packed,
                progress=self.job.progress,
            )
            del model, original
            release(self.device)
        own = _tensors(folder)
        numbers = sum(info.numel for info in own.infos.values())
        sizes = {"before": (0, self.model.source.checkpoint.bytes), "after": (numbers, self._bytes(folder))}
        measures = {
            label: ModelMeasure(
                label=label,
                parameters=self.model.parameters + more,
                tensor_bytes=size,
                bits_per_weight=8 * size / self.model.parameters,
                scores=found,
            )
            for (label, (more, size)), found in zip(sizes.items(), scores, strict=True)
        }
        return measures, time.perf_counter() - clock

    def _bytes(self, folder: Path) -> int:
        """Of all tensors of the adapter and of the model that it is for."""
        base = Checkpoint.open(folder / BASE) if (folder / BASE).is_dir() else self.model.source.checkpoint
        return base.bytes + _tensors(folder).bytes

    def _classes(self, folder: Path) -> dict[str, Any]:
        """What the report says of classes: how many of the rows held back it finds."""
        rows = self._labelled
        if rows is None:
            return {}
        held = self.adapting.steps.held(len(rows.tokens))
        model = load_adapted(self.adapting, folder, self.device)
        last = rows.labels[-held:] if held else ()
        most = max((last.count(one) / held for one in set(last)), default=None)
        return {"classes": list(rows.classes), "accuracy": accuracy(model, rows, held), "most": most}

    def _stage(
        self, plan: Plan, folder: Path, trained: TrainReport, checks: list[Check], memory: PeakMonitor, seconds: float
    ) -> StageReport:
        adapting, own, after = self.adapting, _tensors(folder).bytes, self._bytes(folder)
        return StageReport(
            task="lora",
            method=_settings(adapting),
            format=FORMAT,
            trained=trained,
            adapter=_told(adapting, trained, own).model_copy(
                update={"at_most": plan.bytes_are_bound, **self._classes(folder)}
            ),
            bytes_before=plan.bytes_before,
            bytes_after=after,
            planned_bytes_after=plan.bytes_after,
            bits_per_weight=8 * after / plan.parameters,
            seconds={"learn": trained.seconds, "evaluate": seconds},
            memory=MemoryReport(
                planned_bytes=plan.memory_bytes,
                measured_bytes=memory.above_base_bytes,
                device_bytes=memory.device_bytes,
            ),
            checks=checks,
        )


def _tensors(folder: Path) -> Checkpoint:
    return Checkpoint(folder, read_header(folder / ADAPTER))


__all__ = ["adapt", "join", "labelled", "learn_model", "masked"]
