"""One training from its first step to what was learned, or on from where it was stopped."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from llmshrink import ranks
from llmshrink.engine.workspace import Workspace
from llmshrink.errors import InterruptedRun, UsageError
from llmshrink.forms import Event
from llmshrink.io.files import sha256
from llmshrink.plan.steps import Steps
from llmshrink.progress import Progress
from llmshrink.recipe.train import TrainSpec
from llmshrink.report.schema import LossPoint, TrainReport
from llmshrink.train.data import Lines, collate
from llmshrink.train.folders import STATES, TRAINED
from llmshrink.train.lesson import Lesson
from llmshrink.train.together import anywhere, check_wrapped, check_wrappers, make_whole, missing_none, wait_for_all

GOES_ON = "The same command goes on from what was finished."
POINTS = 100  # about so many losses of a curve are kept
MISSED = 2 * 3600  # seconds after which a process that does not come is given up: states of large models are hashed
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def train(
    lesson: Lesson,
    steps: Steps,
    examples: Lines,
    *,
    workspace: Workspace,
    done: list[dict[str, Any]],
    device: torch.device,
    progress: Progress,
) -> tuple[Path, TrainReport]:
    """Train a model and keep what it learned; done once, whatever comes after it.

    Of several processes all come here; the first alone writes, measures time and tells.

    Args:
        lesson: what is learned.
        steps: how long.
        examples: to learn from.
        workspace: of the run.
        done: entries of the journal about this training.
        device: where it is computed.
        progress: told of the steps.

    Returns:
        The folder of what was learned, and what was measured.
    """
    spec, total = steps.spec, count(steps, examples)
    learned, seen = examples.parts(steps.held(len(examples)))
    if spec.checkpointing:
        _keep_less(lesson.model)
    journal = _Journal(workspace, progress, total, spec.save_minutes, spec.max_minutes)
    trainer = lesson.trainer(
        args=_arguments(spec, total, workspace.work / STATES, device, workspace.output.name),
        train_dataset=learned,
        eval_dataset=seen,
        data_collator=collate,
        callbacks=[journal, *([] if spec.patience is None else [EarlyStoppingCallback(spec.patience)])],
    )
    trainer.remove_callback(PrinterCallback)  # it prints where results belong
    _keep_logs(trainer, workspace.output.name)
    check_wrappers(trainer)
    newest = ranks.shared(lambda: _newest(workspace, done))
    journal.goes_on(newest)
    progress.start(lesson.task, total, 0 if newest is None else newest["step"])
    with missing_none():
        journal.begin = partial(_begin, lesson, trainer, newest)
        trainer.train(resume_from_checkpoint=None if newest is None else str(workspace.folder / newest["folder"]))
        after = _measured(trainer)
        make_whole(lesson.model)
    progress.finish()
    report = TrainReport(
        teacher=lesson.teacher,
        text=examples.told,
        steps=trainer.state.global_step,
        tokens=trainer.state.num_input_tokens_seen,
        rows=len(learned),
        parameters=sum(p.numel() for p in lesson.model.parameters() if p.requires_grad),
        processes=steps.processes,
        measure=lesson.measure,
        held_before=journal.before,
        held_after=after,
        tokens_held=seen.counted,
        loss=lesson.loss,
        curve=_curve(trainer.state, total),
        seconds=journal.seconds,
    )
    report = lesson.tell(report)
    return _save(lesson, workspace, report), report


def _keep_logs(trainer: Trainer, name: str) -> None:
    """Have TensorBoard's files where people look for them: beside the states they would be gone with these."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path("runs", name))


def _keep_less(model: PreTrainedModel) -> None:
    """Keep only what enters each block."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its newer name
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def count(steps: Steps, examples: Lines) -> int:
    """Steps of gradient on these rows, but for those that are held back."""
    rows = len(examples)
    learned = len(examples.parts(steps.held(rows))[0])
    return steps.count(learned, learned * examples.told.tokens // rows)


def finished(workspace: Workspace, done: list[dict[str, Any]]) -> tuple[Path, TrainReport] | None:
    """What `train` gave when this run did it before it was interrupted; None: it is still to be done."""
    found = next((entry for entry in reversed(done) if "trained" in entry), None)
    if found is None or not workspace.holds(found["training"]):
        return None
    return workspace.work / TRAINED, TrainReport.model_validate(found["trained"])


def unlearned(report: TrainReport) -> list[Event]:
    """What to tell of a training that gained nothing on the rows held back."""
    before, after = report.held_before, report.held_after
    if before is None or after is None or after < before:
        return []
    held = f"{before:.4f} -> {after:.4f} on rows held back"
    return [Event("not_learned", f"training made nothing better ({held}): lower train.rate (--rate)")]


def _arguments(spec: TrainSpec, steps: int, folder: Path, device: torch.device, name: str) -> TrainingArguments:
    every = math.ceil(steps / spec.evaluations) if spec.evaluations else steps + 1
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=spec.batch,
        per_device_eval_batch_size=spec.batch,
        gradient_accumulation_steps=spec.accumulate,
        max_steps=steps,
        optim=OPTIMIZERS[spec.optimizer],
        learning_rate=spec.rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=round(spec.warmup * steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.clip,
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),  # products; weights are float32
        eval_strategy="steps" if spec.evaluations else "no",
        eval_steps=every,
        save_strategy="no" if spec.patience is None else "steps",  # else the journal alone says when
        save_steps=every,
        load_best_model_at_end=spec.patience is not None,
        restore_callback_states_from_checkpoint=spec.patience is not None,
        save_total_limit=2,
        logging_steps=1,  # so that a saved state knows of all steps
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        seed=spec.seed,
        use_cpu=device.type == "cpu",
        ddp_timeout=MISSED,
        log_level_replica="passive",  # the other processes have nothing to say either
        report_to=spec.report_to or "none",
        run_name=name,
        disable_tqdm=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
    )
    if arguments.device.index not in (None, device.index or 0) and ranks.count() == 1:
        raise UsageError(
            f"Training takes the first GPU that it sees, and {device} was asked for.",
            hint=f"Set CUDA_VISIBLE_DEVICES={device.index} and leave out --device.",
        )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several in one process would share a batch by copies of the model
    return arguments


def _measured(trainer: Trainer) -> float | None:
    """What is measured of the rows held back, nats per token; None: there are none."""
    if not trainer.eval_dataset:
        return None
    return float(trainer.evaluate()["eval_loss"])


def _begin(lesson: Lesson, trainer: Trainer, newest: dict[str, Any] | None) -> float | None:
    """What is measured before a model has learned anything, or was then; no point of the curve.

    It must be ready to be trained: one that Trainer measures before that would never be wrapped, and each of several
    processes would train its own.
    """
    check_wrapped(trainer.model_wrapped)
    if newest is not None or not trainer.eval_dataset:
        return None if newest is None else newest["before"]
    loader = trainer.get_eval_dataloader()
    with lesson.as_it_was():
        found = trainer.evaluation_loop(loader, "before", prediction_loss_only=True).metrics
    return float(found["eval_loss"])


def _curve(state: TrainerState, steps: int) -> list[LossPoint]:
    """What was measured, and the mean losses of some steps each, at the last of these."""
    losses = [(entry["step"], float(entry["loss"])) for entry in state.log_history if "loss" in entry]
    held = [(entry["step"], float(entry["eval_loss"])) for entry in state.log_history if "eval_loss" in entry]
    every = max(1, steps // POINTS)
    parts = [losses[start : start + every] for start in range(0, len(losses), every)]
    means = [(part[-1][0], fmean(value for _, value in part)) for part in parts]
    points = [LossPoint(step=step, kind="loss", value=value) for step, value in means]
    points += [LossPoint(step=step, kind="held", value=value) for step, value in held]
    return sorted(points, key=lambda point: point.step)


def _newest(workspace: Workspace, done: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last saved state that is whole."""
    states = [entry["state"] | {"saved": entry["training"]} for entry in done if "state" in entry]
    return next((state for state in reversed(states) if workspace.holds(state["saved"])), None)


def _save(lesson: Lesson, workspace: Workspace, report: TrainReport) -> Path:
    folder = workspace.work / TRAINED
    if not ranks.first():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    lesson.save(folder)
    saved = {workspace.below(path): sha256(path) for path in folder.rglob("*") if path.is_file()}
    workspace.append({"files": {}, "training": saved, "trained": report.model_dump(mode="json")})
    shutil.rmtree(workspace.work / STATES, ignore_errors=True)
    return folder


@dataclass
class _Journal(TrainerCallback):  # type: ignore[misc] # it has no types
    """Tells of steps, ends them where a limit is met, and vouches for the states that are saved."""

    workspace: Workspace
    progress: Progress
    steps: int
    save_minutes: float
    max_minutes: float | None
    before: float | None = None
    begin: Callable[[], float | None] = lambda: None  # finds that
    _stopped: InterruptedRun | None = None
    _begun: float = field(default_factory=time.perf_counter)  # as if it had never been interrupted
    _saved: float = field(default_factory=time.perf_counter)

    def goes_on(self, newest: dict[str, Any] | None) -> None:
        """Count the seconds until a state was saved, too."""
        self._begun = time.perf_counter() - (0.0 if newest is None else newest["seconds"])

    @property
    def seconds(self) -> float:
        """Of the training until now, but for those whose steps were lost."""
        return time.perf_counter() - self._begun

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The model is ready, and has learned nothing yet in this call."""
        self.before = self.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """A step is done."""
        now = time.perf_counter()
        try:
            self.progress.advance(1, f"step {state.global_step} of {self.steps}")
        except InterruptedRun as stopped:
            self._stopped = stopped
        over = self.max_minutes is not None and self.seconds >= 60 * self.max_minutes
        old = now - self._saved >= 60 * self.save_minutes
        asked, over, old = anywhere(args.device, self._stopped is not None, over, old)
        if asked and self._stopped is None:
            self._stopped = InterruptedRun("Another process of this run was stopped.", hint=GOES_ON)
        control.should_training_stop |= over
        control.should_save |= asked or old
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A state is on disk."""
        wait_for_all()  # each process has written its part
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if ranks.first():
            saved = {self.workspace.below(path): sha256(path) for path in folder.rglob("*") if path.is_file()}
            entry = {"step": state.global_step, "folder": self.workspace.below(folder), "before": self.before}
            entry["seconds"] = self.seconds
            self.workspace.append({"files": {}, "training": saved, "state": entry})
        self._saved = time.perf_counter()
        if self._stopped is not None:
            raise self._stopped
