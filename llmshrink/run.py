"""The whole story on one screen: resolve, plan, compress, verify, evaluate, report."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink import patterns
from llmshrink.calibration.load import TextLoader
from llmshrink.calibration.rows import Rows
from llmshrink.checks.finished import verify_folder
from llmshrink.checks.gates import Outcome, check_gates, check_size, judge, refuse_unanswerable, size_limit
from llmshrink.checks.preflight import check_finite, check_memory, check_room
from llmshrink.checks.written import (
    check_blocks,
    check_hashes,
    check_layers,
    check_reader,
    probe_tokens,
)
from llmshrink.demo import MODEL_DIR, NAME
from llmshrink.engine.budget import compress_economy, compress_scratch, evaluation_economy, evaluation_states
from llmshrink.engine.compress import Compressor, Result
from llmshrink.engine.hidden import Hidden
from llmshrink.engine.transform import Transformer
from llmshrink.engine.workspace import Workspace
from llmshrink.errors import GateError, InputError, PlanError
from llmshrink.evaluate.measure import measure_models
from llmshrink.forms import Event
from llmshrink.io.files import disk_faults
from llmshrink.machine import StopSignal, enough_memory, environment, pick_device, quiet_libraries, threads
from llmshrink.memory import PeakMonitor, anonymous_bytes, fix_malloc, memory_limit
from llmshrink.model.source import Source, open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.truncate import truncate
from llmshrink.output import finish_files, save_companions, write_report
from llmshrink.plan.choices import Choices
from llmshrink.plan.describe import describe
from llmshrink.plan.economy import Economy
from llmshrink.plan.export import resolve_export
from llmshrink.plan.layout import row_length
from llmshrink.plan.resolve import resolve
from llmshrink.plan.schema import Plan
from llmshrink.plan.transform import changeable
from llmshrink.plan.work import Work
from llmshrink.progress import Progress
from llmshrink.recipe.schema import EvalStage, ExportStage, QuantizeStage, Recipe
from llmshrink.report.schema import (
    AllocationReport,
    Check,
    ModelMeasure,
    Report,
    SensitivityReport,
    StageReport,
)
from llmshrink.sensitivity import costs
from llmshrink.summary import RunFacts, eval_stage, rounding, writing_stage

__all__ = ["check_gates", "check_size", "environment", "execute", "make_plan", "measure", "smoke", "verify"]

ROWS = "calibration.json"  # in the folder of work
SMOKE_ROWS, SMOKE_LENGTH, SMOKE_STEPS = 8, 64, 2


def make_plan(recipe: Recipe) -> Plan:
    """What `execute` would do, without doing it; only an export looks at the weights.

    Raises:
        PlanError: the recipe cannot be carried out on this model.
    """
    with quiet_libraries(), enough_memory(), memory_limit(recipe.run.memory):
        source, _ = _open(recipe)
        return _plan(recipe, StreamedModel(source, pick_device(recipe.run.device)))[1]


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
    fix_malloc()
    writes = _writing_stage(recipe) is not None
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        base = anonymous_bytes()  # all libraries are imported now
        count = stack.enter_context(threads(recipe.run.threads))
        stop = stack.enter_context(StopSignal(resumable=resumable and writes))
        stack.enter_context(enough_memory())
        stack.enter_context(memory_limit(recipe.run.memory))
        source, embedded = _open(recipe)
        _ = source.hashes  # a damaged download is refused before any compute
        facts = RunFacts(recipe, source, embedded, pick_device(recipe.run.device), count, base, command)
        run = _Run(facts, stop.over(progress), cached=resumable)
        return run.write(overwrite) if writes else run.evaluate()


def smoke(recipe: Recipe, *, progress: Progress) -> list[Check]:
    """Compress the first block that the recipe treats in a temporary folder, reload, verify: seconds, not hours."""
    with quiet_libraries(), tempfile.TemporaryDirectory(prefix="llmshrink-smoke-") as name:
        source, _ = _open(recipe)
        model = StreamedModel(source, torch.device("cpu"))
        work, *_ = _plan(recipe, model)  # what is refused for the whole model is refused here too
        small = Path(name) / "model"
        small.mkdir()
        treated = [b.index for b in model.anatomy.blocks if any(m in work.methods for m in b.matrices)]
        truncate(model, small, treated[0] + 1)
        cut = _smoke_recipe(recipe, work, treated[0], small, Path(name) / "out")
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
    fix_malloc()
    recipe = costs.open_recipe(recipe)
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        base = anonymous_bytes()
        count = stack.enter_context(threads(recipe.run.threads))
        stop = stack.enter_context(StopSignal(resumable=True))
        stack.enter_context(enough_memory())
        stack.enter_context(memory_limit(recipe.run.memory))
        source, embedded = _open(recipe)
        facts = RunFacts(recipe, source, embedded, pick_device(recipe.run.device), count, base, None)
        if save is not None:
            costs.check_place(save)
        found = _Run(facts, stop.over(progress), cached=True).measure()
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


class _Run:
    """One run of one recipe."""

    def __init__(self, facts: RunFacts, progress: Progress, *, cached: bool) -> None:
        """`cached`: what is measured of candidates is kept for other runs."""
        self.cached = cached
        self.start = time.perf_counter()
        self.facts, self.recipe, self.progress = facts, facts.recipe, progress
        self.model = StreamedModel(facts.source, facts.device)
        self.loader = TextLoader(self.model, embedded=facts.embedded, progress=progress)

    def evaluate(self) -> Report:
        """Measure the model as it is, beside another one where the recipe names it."""
        refuse_unanswerable(self.recipe, self.model)
        models = {"before": self.model}
        if self.recipe.evaluation.baseline is not None:
            models = {"before": self._baseline(self.recipe.evaluation.baseline), "after": self.model}
        length = row_length(self.recipe.evaluation.length, self.model, self.loader.events)
        texts = self.loader.evaluation(self.recipe.evaluation, length, None)
        economy, needed = evaluation_economy(self.model, self.recipe, length)
        if texts:
            check_memory("score the texts", needed, self.recipe.run, "--rows, --length")
            self.loader.events += economy.told("score the texts")
        states = evaluation_states(self.model, self.recipe.evaluation.rows, length) if economy.on_disk else 0
        scratch = disk_faults(Path(tempfile.gettempdir()), states)
        with scratch, tempfile.TemporaryDirectory(prefix="llmshrink-") as folder:
            measures, seconds = self._measure(models, texts, economy, Path(folder))
        self._tell(self.loader.events)
        stages = [eval_stage(self.model, seconds) for _ in self.recipe.stages]
        return self.facts.report(
            stages=self._judged(stages, models, measures),
            calibration=None,
            measures=measures,
            events=self.loader.events,
            output=None,
            seconds=time.perf_counter() - self.start,
        )

    def measure(self) -> SensitivityReport:
        """What each candidate costs in each unit."""
        stage = _writing_stage(self.recipe)
        assert isinstance(stage, QuantizeStage)
        choices = Choices(self.recipe, stage, self.model)
        work = choices.works[0]
        economy, needed = compress_economy(work, self.recipe, choices)
        check_memory("measure the candidates", needed, self.recipe.run, "--samples, --length")
        check_finite(self.model, self.progress)
        rows = self.loader.calibration(self.recipe.calibration, work.length)
        states = compress_scratch(work, self.recipe) if economy.on_disk else 0
        scratch = disk_faults(Path(tempfile.gettempdir()), states)
        with scratch, tempfile.TemporaryDirectory(prefix="llmshrink-") as folder:
            found, events = costs.costs(
                choices,
                rows,
                self.facts,
                economy=economy,
                folder=Path(folder),
                cached=True,
                progress=self.progress,
            )
        events = [*self.loader.events, *economy.told("measure the candidates"), *events]
        self._tell(events)
        return costs.sensitivities(choices, found, events)

    def _tell(self, *events: list[Event]) -> int:
        """Tell of events as they happen; returns the length of the last list."""
        for event in itertools.chain(*events):
            self.progress.event(event)
        return len(events[-1])

    def _baseline(self, name: str) -> StreamedModel:
        """The model to compare with, which must read the same tokens."""
        baseline = StreamedModel(open_source(name), self.facts.device)
        if baseline.vocabulary != self.model.vocabulary:
            sizes = f"{baseline.vocabulary} and {self.model.vocabulary}"
            raise InputError(f"{name} and {self.model.source.id} have other vocabularies ({sizes} tokens).")
        if (baseline.task, baseline.width) != (self.model.task, self.model.width):
            kinds = " and ".join(f"{model.width} {model.task.gives}" for model in (baseline, self.model))
            raise InputError(f"{name} and {self.model.source.id} do not give out the same ({kinds}).")
        return baseline

    def write(self, overwrite: bool) -> Report:
        """Compress, verify, measure, commit."""
        if self.recipe.evaluation.baseline is not None:
            raise PlanError("evaluation.baseline is for `llmshrink eval`: this command compares with the original.")
        work, plan, choices = _plan(self.recipe, self.model)
        check_size(plan)
        check_room(plan, work.output, self.facts.source, self.recipe.run)
        with disk_faults(work.output, plan.disk_bytes), Workspace(work.output, overwrite=overwrite) as workspace:
            check_finite(self.model, self.progress)
            rows = self._calibration(work, workspace) if work.needs_data or choices else None
            happened = list(self.loader.events)
            length = row_length(self.recipe.evaluation.length, self.model, work.events)
            texts = self.loader.evaluation(self.recipe.evaluation, length, rows)
            done = workspace.begin(self.facts.identity(rows), resume=self.recipe.run.resume)
            if rows is not None:
                rows.save(workspace.work / ROWS, self._text_key(work), happened)
            with PeakMonitor(self.facts.device, base=self.facts.base_bytes) as memory:
                chosen = None
                if choices is not None:
                    work, plan, chosen = self._allocate(choices, work, plan.memory_bytes, rows, workspace)
                known = self._tell(workspace.events, work.events, self.loader.events)
                clock, probe = time.perf_counter(), probe_tokens(self.model)
                companions = save_companions(work, workspace.folder)
                result, ends = self._compress(work, workspace, rows, probe, done)
                result.events += rounding(work, result)
                files = {**companions, **finish_files(work, workspace, result)}
                seconds = time.perf_counter() - clock
            written = StreamedModel(Source(str(work.output), workspace.folder, None), self.facts.device)
            checks = self._verify(work, written, result, files, probe, ends)
            done_so = writing_stage(work, plan, result, checks, memory, written, seconds)
            stages = [done_so.model_copy(update={"allocation": chosen})]
            models = {"before": self.model, "after": written}
            measures, seconds = self._measure(models, texts, work.scoring, workspace.work)
            stages += [eval_stage(written, seconds) for stage in self.recipe.stages if stage.task == "eval"]
            report = self.facts.report(
                stages=self._judged(stages, models, measures),
                calibration=rows,
                measures=measures,
                events=[*workspace.events, *work.events, *self.loader.events, *result.events],
                output=str(work.output),
                seconds=time.perf_counter() - self.start,
            )
            self._tell(self.loader.events[known:])
            write_report(workspace.folder, report, self.recipe)
            workspace.commit()
        return report

    def _allocate(
        self, choices: Choices, guessed: Work, needed: int, rows: Rows | None, workspace: Workspace
    ) -> tuple[Work, Plan, AllocationReport]:
        """Choose what every layer gets; from here on the recipe says it."""
        assert rows is not None
        assignment, found, events = costs.choose(
            choices,
            rows,
            self.facts,
            economy=guessed.economy,
            folder=workspace.work,
            cached=self.cached,
            progress=self.progress,
        )
        self.recipe = choices.recipe(assignment)
        self.facts = replace(self.facts, recipe=self.recipe)
        work, plan, _ = _plan(self.recipe, self.model)
        check_size(plan)
        plan = plan.model_copy(update={"memory_bytes": max(plan.memory_bytes, needed)})
        kept = [event for event in guessed.events if event.kind == "length_cut" and event not in work.events]
        work.events += [*kept, *events, *choices.events(work)]
        return work, plan, costs.told(choices, assignment, found, choices.size(work))

    def _measure(
        self, models: dict[str, StreamedModel], texts: list[Rows], economy: Economy, folder: Path
    ) -> tuple[dict[str, ModelMeasure], float]:
        """The measures of each model, and the seconds they took together."""
        clock, events = time.perf_counter(), self.loader.events
        measures = measure_models(self.recipe, models, texts, events, self.progress, economy=economy, folder=folder)
        return measures, time.perf_counter() - clock

    def _judged(
        self, stages: list[StageReport], models: dict[str, StreamedModel], measures: dict[str, ModelMeasure]
    ) -> list[StageReport]:
        """What was done, with the verdicts on what the recipe asks of it; a stage that writes comes first."""
        missing = [event.message for event in self.loader.events if event.kind == "not_measured"]
        sizes = [model.source.checkpoint.file_bytes for model in models.values()]
        outcome = Outcome(measures, sizes[0], sizes[-1], "; ".join(m for m in missing if m.startswith("quality")))
        wanted = sorted(self.recipe.stages, key=lambda stage: isinstance(stage, EvalStage))
        gates = [judge(stage.gate, outcome) for stage in wanted]
        return [done.model_copy(update={"gates": found}) for done, found in zip(stages, gates, strict=True)]

    def _calibration(self, work: Work, workspace: Workspace) -> Rows:
        """The rows that an unfinished run of this output began with, else new ones.

        What `auto` means depends on the network, and sampling takes long: neither is done again in the middle of a run.
        """
        kept = Rows.load(workspace.work / ROWS, self._text_key(work)) if self.recipe.run.resume else None
        if kept is None:
            return self.loader.calibration(self.recipe.calibration, work.length)
        self.loader.events += kept[1]
        return kept[0]

    def _text_key(self, work: Work) -> dict[str, Any]:
        """What calibration rows depend on, but for what `auto` means today."""
        calibration = self.facts.resolved["calibration"]
        return {"model": self.facts.source.hashes, "calibration": calibration, "length": work.length}

    def _compress(
        self, work: Work, workspace: Workspace, rows: Rows | None, probe: Tensor, done: list[dict[str, Any]]
    ) -> tuple[Result, Tensor]:
        """All parts; also the states in which the probe rows leave the last block."""
        economy = work.economy
        batches = rows.batches(economy.batch_tokens) if rows is not None else []
        begun = next((entry["batches"] for entry in done if "batches" in entry), None)
        if rows is not None and begun is not None:
            batches = rows.grouped(begun)  # a run goes on as it began
        folder, originals = workspace.work if economy.on_disk else None, work.needs_originals
        embed = partial(Hidden, work.model, batches, probe, folder, originals=originals)
        subset, seed = self.recipe.run.sequential == "subset", self.recipe.calibration.seed
        transforms, transformer = work.transforms, None
        if transforms is not None:
            transformer = Transformer(work, transforms, self.model, probe, workspace.work)
        compressor = Compressor(
            work,
            workspace,
            embed,
            transformer=transformer,
            economy=economy,
            subset=subset,
            seed=seed,
            progress=self.progress,
        )
        return compressor.run(done)

    def _verify(
        self,
        work: Work,
        written: StreamedModel,
        result: Result,
        files: dict[str, str],
        probe: Tensor,
        ends: Tensor,
    ) -> list[Check]:
        """Read back everything that was written.

        Raises:
            GateError: a file is not what was meant; the unfinished folder is kept for a look.
        """
        self.progress.start("verify", 0)
        folder = written.source.folder
        sizes = {name: (folder / name).stat().st_size for name in work.file_bytes}
        off = [name for name, size in sizes.items() if size != work.file_bytes[name]]
        checks = [
            Check(
                name="sizes", passed=not off, detail="files have the planned size" if not off else f"{off[0]} has not"
            ),
            check_hashes(folder, files),
            *check_layers(work.model, written, result.layers, result.replaced),
            check_blocks(written, probe, ends),
            check_reader(StreamedModel(written.source, torch.device("cpu")), probe, self.model.anatomy.unused),
        ]
        if checks[-1].passed is None:
            why = f"no foreign reader: {checks[-1].detail}"
            self.loader.events.append(Event("not_verified", why))
        self.progress.finish()
        if failed := [check for check in checks if check.passed is False]:
            shown = "\n".join(f"  - {check.name}: {check.detail}" for check in failed)
            raise GateError(f"What was written does not verify; it stays in {folder}:\n{shown}")
        return checks


# --- the parts of a run that take a line each above


def _open(recipe: Recipe) -> tuple[Source, bool]:
    """The model of a recipe, and whether it is the embedded one."""
    if recipe.model.id is None or recipe.model.id == NAME:
        embedded = open_source(str(MODEL_DIR))
        return Source(NAME, embedded.folder, None), True
    return open_source(recipe.model.id, recipe.model.revision), False


def _writing_stage(recipe: Recipe) -> QuantizeStage | ExportStage | None:
    stages = [stage for stage in recipe.stages if isinstance(stage, QuantizeStage | ExportStage)]
    if len(stages) > 1:
        raise PlanError(
            "A recipe can hold one stage that writes a model.",
            hint="Make two recipes, the second with the first one's output as its model.",
        )
    return stages[0] if stages else None


def _plan(recipe: Recipe, model: StreamedModel) -> tuple[Work, Plan, Choices | None]:
    """What is done; where a size is asked for, one way to meet it, and all that could be chosen."""
    stage = _writing_stage(recipe)
    if stage is None:
        raise PlanError("The recipe only evaluates: there is nothing to plan.")
    refuse_unanswerable(recipe, model)
    if isinstance(stage, QuantizeStage) and stage.transform:
        model = changeable(stage.transform, model)
    choices = None
    if isinstance(stage, QuantizeStage) and stage.allocate is not None:
        choices = Choices(recipe, stage, model)
        choices.check()
        work = choices.guessed()
    elif isinstance(stage, QuantizeStage):
        work = resolve(recipe, stage, model)
    else:
        work = resolve_export(recipe, stage, model)
    work.economy, memory = compress_economy(work, recipe, choices)
    work.events += work.economy.told("compress")
    scratch, evaluation = compress_scratch(work, recipe), 0
    if recipe.evaluation.data:
        length = row_length(recipe.evaluation.length, model, [])
        work.scoring, evaluation = evaluation_economy(model, recipe, length)
        work.events += work.scoring.told("compare both models")
        states = evaluation_states(model, recipe.evaluation.rows, length)
        scratch = max(scratch, states if work.scoring.on_disk else 0)
    limit = size_limit(recipe, model.source.checkpoint.file_bytes)
    plan = describe(
        work, choices, memory_bytes=memory, evaluation_bytes=evaluation, scratch_bytes=scratch, max_bytes=limit
    )
    return work, plan, choices


def _smoke_recipe(recipe: Recipe, work: Work, last: int, source: Path, output: Path) -> Recipe:
    """The same recipe on the truncated model: few short rows, nothing measured or gated, no other block's patterns."""
    cut = {m for block in work.model.anatomy.blocks[last + 1 :] for m in block.matrices}
    names = [m.name for m in work.model.anatomy.matrices if m not in cut]
    data = json.loads(recipe.model_dump_json())
    for stage in data["stages"]:
        stage["gate"] = {}
        if stage["task"] == "quantize":
            stage["layers"] = {p: v for p, v in stage["layers"].items() if any(patterns.matches(p, n) for n in names)}
            if stage["allocate"] is not None:
                stage["allocate"] |= {"size": None, "bpw": None, "rows": SMOKE_STEPS, "length": SMOKE_LENGTH}
            if stage["reconstruct"] is not None:
                stage["reconstruct"]["steps"] = SMOKE_STEPS
            tune = None if work.tune is None else work.tune.model_copy(update={"steps": SMOKE_STEPS})
            stage["tune"] = tune and tune.model_dump()
            stage["ignore"] = [p for p in stage["ignore"] if any(patterns.matches(p, n) for n in names)]
    calibration = {**data["calibration"], "samples": SMOKE_ROWS, "length": SMOKE_LENGTH}
    if calibration["data"] == "auto" and recipe.model.id in (None, NAME):
        calibration["data"] = "generator"
    run = {**data["run"], "strict": False}
    return recipe.model_validate(
        {
            **data,
            "model": {"id": str(source)},
            "calibration": calibration,
            "evaluation": {**data["evaluation"], "data": [], "speed": False},
            "run": run,
            "output": str(output),
        }
    )


def _stage_checks(report: Report) -> list[Check]:
    return [check for stage in report.stages for check in stage.checks]
