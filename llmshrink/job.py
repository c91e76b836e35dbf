"""One run of one recipe: resolve, plan, compress, verify, evaluate, report.

What trains is imported where it is used: Trainer and peft take seconds.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmshrink.calibration.load import TextLoader
from llmshrink.calibration.rows import Rows
from llmshrink.checks.gates import Outcome, check_size, judge, refuse_unanswerable
from llmshrink.checks.preflight import check_finite, check_memory, check_room
from llmshrink.checks.written import (
    check_blocks,
    check_hashes,
    check_layers,
    check_reader,
    probe_tokens,
)
from llmshrink.engine.bases import make_bases
from llmshrink.engine.budget import (
    compress_economy,
    compress_scratch,
    evaluation_economy,
    evaluation_states,
)
from llmshrink.engine.compress import Compressor, Result
from llmshrink.engine.hidden import Hidden
from llmshrink.engine.slopes import make_slopes, together
from llmshrink.engine.transform import Transformer
from llmshrink.engine.workspace import Workspace
from llmshrink.errors import GateError, InputError, PlanError
from llmshrink.evaluate.measure import measure_models
from llmshrink.forms import Event
from llmshrink.io.files import disk_faults
from llmshrink.memory import PeakMonitor, anonymous_bytes
from llmshrink.model.source import Source, open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.output import finish_files, save_companions, write_report
from llmshrink.plan.adapting import Adapting
from llmshrink.plan.choices import Choices
from llmshrink.plan.cut import Cuts
from llmshrink.plan.economy import Economy
from llmshrink.plan.layout import row_length
from llmshrink.plan.ratios import Ratios
from llmshrink.plan.schema import Plan
from llmshrink.plan.steps import Steps
from llmshrink.plan.training import Training
from llmshrink.plan.work import Work
from llmshrink.planning import plan_of, planned, writing_stage_of
from llmshrink.progress import Progress
from llmshrink.recipe.lora import LoraStage
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import EvalStage, MatrixStage
from llmshrink.report.schema import (
    AllocationReport,
    Check,
    CutReport,
    ModelMeasure,
    RatiosReport,
    Report,
    SensitivityReport,
    StageReport,
)
from llmshrink.sensitivity import costs, cutting
from llmshrink.sensitivity import ratios as shares
from llmshrink.summary import RunFacts, eval_stage, rounding, writing_stage
from llmshrink.train import folders

if TYPE_CHECKING:
    from llmshrink.train.data import Examples, Learned

ROWS = "calibration.json"  # in the folder of work, as


class Job:
    """One run of one recipe."""

    def __init__(
        self,
        facts: RunFacts,
        progress: Progress,
        *,
        cached: bool,
        learned: Learned | None = None,
        original: StreamedModel | None = None,
    ) -> None:
        """Open the model.

        Args:
            facts: what is fixed.
            progress: told of the steps.
            cached: what is measured of candidates is kept for other runs.
            learned: the text that the run it is part of learns from.
            original: what the model was made from by stages before; None: nothing came before.
        """
        self.cached, self._learned = cached, learned
        self.start = time.perf_counter()
        self.facts, self.recipe, self.progress = facts, facts.recipe, progress
        self.model = StreamedModel(facts.source, facts.device)
        self.model.original = original
        self.loader = TextLoader(self.model.original, embedded=facts.embedded, progress=progress)

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
        self.tell(self.loader.events)
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
        stage = writing_stage_of(self.recipe)
        assert isinstance(stage, MatrixStage)
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
        self.tell(events)
        return costs.sensitivities(choices, found, events)

    def aside(self, recipe: Recipe, source: Source, progress: Progress | None = None) -> Job:
        """A run of its own that makes what this one goes on with."""
        # What others left behind is no memory of this run.
        facts = replace(self.facts, recipe=recipe, source=source, base_bytes=anonymous_bytes())
        original = None if source is self.facts.source and self.model.original is self.model else self.model.original
        return Job(facts, progress or self.progress, cached=False, learned=self._learned, original=original)

    def tell(self, *events: list[Event]) -> int:
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
        work, plan, choices = plan_of(self.recipe, self.model)
        check_size(plan)
        check_room(plan, work.output, self.facts.source, self.recipe.run)
        with disk_faults(work.output, plan.disk_bytes), Workspace(work.output, overwrite=overwrite) as workspace:
            check_finite(self.model, self.progress)
            examples = self.examples(choices.steps, workspace) if isinstance(choices, Training | Adapting) else None
            known = len(self.loader.events)
            needed = work.needs_data or (choices is not None and choices.needs_data)
            rows = self._calibration(work, workspace) if needed else None
            happened = self.loader.events[known:]
            length = row_length(self.recipe.evaluation.length, self.model, work.events)
            texts = self.loader.evaluation(self.recipe.evaluation, length, rows)
            if examples is not None:
                from llmshrink.train.overlap import overlaps

                self.loader.events += overlaps(examples, texts)
            identity = self.facts.identity(rows, None if examples is None else examples.told.fingerprint)
            made = () if examples is None else (examples.folder.name,)
            done = workspace.begin(identity, resume=self.recipe.run.resume, folders=folders.ALL, made=made)
            learned, done = [e for e in done if "training" in e], [e for e in done if "training" not in e]
            if rows is not None:
                rows.save(workspace.work / ROWS, self._text_key(work), happened)
            with PeakMonitor(self.facts.device, base=self.facts.base_bytes) as memory:
                chosen: dict[str, Any] = {}
                if isinstance(choices, Choices):
                    work, plan, chosen["allocation"] = self._allocate(choices, work, plan.memory_bytes, rows, workspace)
                elif isinstance(choices, Ratios):
                    work, plan, chosen["ratios"] = self._share(choices, work, plan.memory_bytes, rows, workspace)
                    chosen["method"] = {"name": plan.method, **choices.settings}  # not those of its largest group
                elif isinstance(choices, Training):
                    from llmshrink.distilling import learn_student

                    assert examples is not None
                    work, plan, chosen = learn_student(self, choices, work, examples, workspace, learned)
                elif isinstance(choices, Adapting):
                    assert examples is not None
                    examples = examples.moved(workspace.work / folders.TEXT)
                    from llmshrink.adapting import learn_model

                    work, plan, chosen = learn_model(self, choices, examples, workspace, learned)
                elif choices is not None:
                    work, plan, chosen["cut"] = self._cut(choices, work, plan.memory_bytes, rows, workspace)
                known = self.tell(workspace.events, work.events, self.loader.events)
                clock, probe = time.perf_counter(), probe_tokens(self.model)
                companions = save_companions(work, workspace.folder)
                result, ends = self._compress(work, workspace, rows, probe, done)
                result.events += rounding(work, result)
                files = {**companions, **finish_files(work, workspace, result)}
                seconds = time.perf_counter() - clock
            written = StreamedModel(Source(str(work.output), workspace.folder, None), self.facts.device)
            checks = [*chosen.pop("checks", []), *self._verify(work, written, result, files, probe, ends)]
            done_so = writing_stage(work, plan, result, checks, memory, written, seconds)
            stages = [done_so.model_copy(update=chosen)]
            original = self.model.original
            if isinstance(choices, Training):
                from llmshrink.distilling import taught_by

                original = taught_by(self, choices)
            models = {"before": original, "after": written}
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
            self.tell(self.loader.events[known:])
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
        work, plan = self._planned_again(choices.recipe(assignment), guessed, needed)
        work.events += [*events, *choices.events(work)]
        return work, plan, costs.told(choices, assignment, found, choices.size(work))

    def _share(
        self, ratios: Ratios, guessed: Work, needed: int, rows: Rows | None, workspace: Workspace
    ) -> tuple[Work, Plan, RatiosReport]:
        """Find what share of every layer goes; from here on the recipe says it."""
        economy, folder = guessed.economy, workspace.work
        found = shares.choose(ratios, rows, economy=economy, folder=folder, progress=self.progress)
        work, plan = self._planned_again(ratios.recipe(found.shares, found.alone), guessed, needed)
        work.events += [*ratios.events, *found.events]
        return work, plan, shares.told(ratios, found)

    def _planned_again(self, recipe: Recipe, guessed: Work, needed: int) -> tuple[Work, Plan]:
        """The work of a recipe that says what was chosen; `needed` is the memory of the choosing."""
        self.recipe = recipe
        self.facts = replace(self.facts, recipe=recipe)
        work, plan, _ = plan_of(recipe, self.model)
        check_size(plan)
        kept = [event for event in guessed.events if event.kind == "length_cut" and event not in work.events]
        work.events += kept
        return work, plan.model_copy(update={"memory_bytes": max(plan.memory_bytes, needed)})

    def _cut(
        self, cuts: Cuts, guessed: Work, needed: int, rows: Rows | None, workspace: Workspace
    ) -> tuple[Work, Plan, CutReport]:
        """Find out what is cut, and plan that."""
        folder = workspace.work
        tried, events = cutting.choose(cuts, rows, economy=guessed.economy, folder=folder, progress=self.progress)
        work = cuts.work(tried[0].chosen)
        work.events += events
        plan = planned(self.recipe, self.model, work, cuts)
        check_size(plan)
        plan = plan.model_copy(update={"memory_bytes": max(plan.memory_bytes, needed)})
        return work, plan, cutting.told(cuts, tried, work)

    def _measure(
        self, models: dict[str, StreamedModel], texts: list[Rows], economy: Economy, folder: Path
    ) -> tuple[dict[str, ModelMeasure], float]:
        """The measures of each model, and the seconds they took together."""
        clock, events = time.perf_counter(), self.loader.events
        measures = measure_models(self.recipe, models, texts, events, self.progress, economy=economy, folder=folder)
        return measures, time.perf_counter() - clock

    def _judged(
        self,
        stages: list[StageReport],
        models: dict[str, StreamedModel],
        measures: dict[str, ModelMeasure],
        beside: int = 0,
    ) -> list[StageReport]:
        """What was done, with the verdicts on what the recipe asks of it; a stage that writes comes first.

        `beside`: bytes of files that hold tensors beside the last model.
        """
        missing = [event.message for event in self.loader.events if event.kind == "not_measured"]
        sizes = [model.source.checkpoint.file_bytes for model in models.values()]
        why = "; ".join(m for m in missing if m.startswith("quality"))
        learned = any(isinstance(stage, LoraStage) for stage in self.recipe.stages)
        outcome = Outcome(measures, sizes[0], sizes[-1] + beside, why, learned)
        wanted = sorted(self.recipe.stages, key=lambda stage: isinstance(stage, EvalStage))
        gates = [judge(stage.gate, outcome) for stage in wanted]
        return [done.model_copy(update={"gates": found}) for done, found in zip(stages, gates, strict=True)]

    def judged_again(self, report: Report, folder: Path) -> Report:
        """What this run reported before, with the verdicts of the gates that there are now."""
        written = StreamedModel(Source(str(folder), folder, None), self.facts.device)
        models = {"before": self.model.original, "after": written}
        measures = {name: found for name in models if (found := getattr(report, name)) is not None}
        return report.model_copy(update={"stages": self._judged(report.stages, models, measures)})

    def _calibration(self, work: Work, workspace: Workspace) -> Rows:
        """The rows to calibrate with: those that an unfinished run of this output began with, or new.

        What `auto` means depends on the network, and sampling takes long: neither is done again in the middle of a run.
        """
        kept = Rows.load(workspace.work / ROWS, self._text_key(work)) if self.recipe.run.resume else None
        if kept is None:
            spec, learned = self.recipe.calibration, self._learned
            if spec.data != "auto" or learned is None:
                return self.loader.calibration(spec, work.length)
            self.loader.events.append(
                Event("train_calibration", f"calibrated on the text to train on: {learned.origin}")
            )
            return learned.rows(spec.samples, work.length)
        self.loader.events += kept[1]
        return kept[0]

    def examples(self, steps: Steps, workspace: Workspace) -> Examples:
        """The rows to learn from, in a file of the folder of work."""
        kept = workspace.work / folders.TEXT if self.recipe.run.resume else None
        new = workspace.work / folders.NEW_TEXT
        from llmshrink.train.prepare import prepare

        found = prepare(steps, self.model, self.loader, new, kept=kept, progress=self.progress)
        self.loader.events += found.events
        if steps.spec.data != "auto":
            from llmshrink.train.data import Learned

            self._learned = Learned(found, steps.held(len(found)))
        return found

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
        clock = time.perf_counter()
        if work.stacks:
            make_bases(work, batches, folder=workspace.work, progress=self.progress)
        if work.needs_slopes and rows is not None:
            most = together(sum(map(len, rows.tokens)), len(work.model.anatomy.blocks))
            parts = [part.batches(economy.batch_tokens) for part in rows.parted(most)]
            make_slopes(work, parts, self.recipe.calibration.seed, folder=workspace.work, progress=self.progress)
        before = time.perf_counter() - clock
        folder, originals = workspace.work if economy.on_disk else None, work.needs_originals
        embed = partial(
            Hidden,
            work.model,
            batches,
            probe,
            folder,
            originals=originals,
            original=work.original if originals else None,
        )
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
        result, ends = compressor.run(done)
        if work.stacks or work.needs_slopes:
            result.seconds = {"look ahead": before, **result.seconds}
        return result, ends

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
        planned = work.file_bytes
        off = [name for name, size in sizes.items() if size > planned[name] or (size < planned[name] and not work.pack)]
        kept = f"files have {'at most ' if work.pack else ''}the planned size"
        checks = [
            Check(name="sizes", passed=not off, detail=f"{off[0]} has not" if off else kept),
            check_hashes(folder, files),
            *check_layers(work.model, written, result.layers, result.replaced, work.fitted),
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
