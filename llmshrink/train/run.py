"""One training from its first step to a checkpoint that transformers loads, or on from where it was stopped."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llmshrink.calibration.rows import Rows
from llmshrink.engine.workspace import Workspace
from llmshrink.errors import InterruptedRun
from llmshrink.io.files import copy_file, sha256, write_json
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.training import Training
from llmshrink.progress import Progress
from llmshrink.report.schema import LossPoint, TrainReport
from llmshrink.train.trainer import Distiller

STATES, TRAINED = "trainer", "trained"  # folders in the folder of work
FEW = 20  # rows of which none are held back


def train(
    training: Training,
    student: StreamedModel,
    rows: Rows,
    *,
    workspace: Workspace,
    done: list[dict[str, Any]],
    device: torch.device,
    progress: Progress,
) -> tuple[Path, TrainReport]:
    """Train a student and write it as a checkpoint; done once, whatever comes after it.

    Args:
        training: who learns from whom.
        student: as it is before.
        rows: to learn from.
        workspace: of the run.
        done: entries of the journal about this training.
        device: where it is computed.
        progress: told of the steps.

    Returns:
        The folder of the checkpoint, and what was measured.
    """
    folder, finished = workspace.work / TRAINED, [entry for entry in done if "trained" in entry]
    if finished and workspace.holds(finished[-1]["training"]):
        return folder, TrainReport.model_validate(finished[-1]["trained"])
    spec, held = training.stage.train, _held(rows, training.stage.train.hold, training.stage.train.batch)
    learned, seen = rows.tokens[: len(rows.tokens) - held], rows.tokens[len(rows.tokens) - held :]
    steps = training.steps(len(learned))
    learner, teacher = _load(student.source, student), _load(training.teacher, student).requires_grad_(False)
    journal = _Journal(workspace, progress, steps, spec.save_minutes, spec.max_minutes)
    trainer = Distiller(
        teacher=teacher.eval().to(device),
        loss=training.stage.loss,
        model=learner,
        args=_arguments(training, steps, workspace.work / STATES, device),
        train_dataset=[{"input_ids": row, "labels": row} for row in learned],
        eval_dataset=[{"input_ids": row, "labels": row} for row in seen],
        callbacks=[journal, *([] if spec.patience is None else [EarlyStoppingCallback(spec.patience)])],
    )
    trainer.remove_callback(PrinterCallback)  # it prints where results belong
    start, newest = time.perf_counter(), _newest(workspace, done)
    progress.start("distill", steps, 0 if newest is None else newest["step"])
    before = _measured(trainer) if newest is None else newest["before"]
    journal.before = before
    trainer.train(resume_from_checkpoint=None if newest is None else str(workspace.folder / newest["folder"]))
    after = _measured(trainer)
    progress.finish()
    report = TrainReport(
        teacher=training.teacher.id,
        steps=trainer.state.global_step,
        tokens=trainer.state.global_step * training.per_step * rows.length,
        rows=len(learned),
        parameters=sum(p.numel() for p in learner.parameters() if p.requires_grad),
        kl_before=before,
        kl_after=after,
        tokens_held=sum(len(row) for row in seen),
        curve=_curve(trainer.state),
        seconds=time.perf_counter() - start,
    )
    files = _save(learner, student, folder)
    saved = {workspace.below(folder / name): digest for name, digest in files.items()}
    workspace.append({"files": {}, "training": saved, "trained": report.model_dump(mode="json")})
    shutil.rmtree(workspace.work / STATES, ignore_errors=True)
    return folder, report


def _held(rows: Rows, share: float, batch: int) -> int:
    """How many rows are held back: whole batches, none of a few."""
    count = len(rows.tokens)
    return 0 if count < FEW or not share else min(count // 2, max(batch, round(share * count)))


def _load(source: Source, like: StreamedModel) -> PreTrainedModel:
    """A model as a whole, in float32."""
    model: PreTrainedModel = like.task.loader.from_pretrained(
        source.folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    )
    return model


def _arguments(training: Training, steps: int, folder: Path, device: torch.device) -> TrainingArguments:
    spec = training.stage.train
    every = math.ceil(steps / spec.evaluations) if spec.evaluations else steps + 1
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=spec.batch,
        per_device_eval_batch_size=spec.batch,
        gradient_accumulation_steps=spec.accumulate,
        max_steps=steps,
        learning_rate=spec.rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=round(spec.warmup * steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.clip,
        eval_strategy="steps" if spec.evaluations else "no",
        eval_steps=every,
        save_strategy="no" if spec.patience is None else "steps",  # else the journal alone says when
        save_steps=every,
        load_best_model_at_end=spec.patience is not None,
        restore_callback_states_from_checkpoint=spec.patience is not None,
        save_total_limit=2,
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        seed=spec.seed,
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
    )


def _measured(trainer: Distiller) -> float | None:
    """KL from the teacher on the rows held back, nats per token; None: there are none."""
    if not trainer.eval_dataset:
        return None
    return float(trainer.evaluate()["eval_loss"])


def _curve(state: TrainerState) -> list[LossPoint]:
    kinds = {"loss": "loss", "eval_loss": "held"}
    return [
        LossPoint(step=entry["step"], kind=kind, value=float(entry[key]))
        for entry in state.log_history
        for key, kind in kinds.items()
        if key in entry
    ]


def _newest(workspace: Workspace, done: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last saved state that is whole."""
    states = [entry["state"] | {"saved": entry["training"]} for entry in done if "state" in entry]
    return next((state for state in reversed(states) if workspace.holds(state["saved"])), None)


def _save(learner: PreTrainedModel, student: StreamedModel, folder: Path) -> dict[str, str]:
    """Write what was learned, in the dtype that the student was stored in; the SHA-256 of each file."""
    shutil.rmtree(folder, ignore_errors=True)
    learner.to(student.source.config.dtype or torch.float32).save_pretrained(folder)
    write_json(folder / "config.json", student.source.config_dict)
    for name, path in student.source.companions.items():
        copy_file(path, folder / name)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


@dataclass
class _Journal(TrainerCallback):  # type: ignore[misc] # it has no types
    """Tells of steps, ends them where a limit is met, and vouches for the states that are saved."""

    workspace: Workspace
    progress: Progress
    steps: int
    save_minutes: float
    max_minutes: float | None
    before: float | None = None
    _stopped: InterruptedRun | None = None
    _begun: float = field(default_factory=time.perf_counter)
    _saved: float = field(default_factory=time.perf_counter)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """A step is done."""
        now = time.perf_counter()
        try:
            self.progress.advance(1, f"step {state.global_step} of {self.steps}")
        except InterruptedRun as stopped:
            self._stopped = stopped
        if self.max_minutes is not None and now - self._begun >= 60 * self.max_minutes:
            control.should_training_stop = True
        if self._stopped is not None or now - self._saved >= 60 * self.save_minutes:
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A state is on disk."""
        self._saved = time.perf_counter()
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        saved = {self.workspace.below(path): sha256(path) for path in folder.rglob("*") if path.is_file()}
        entry = {"step": state.global_step, "folder": self.workspace.below(folder), "before": self.before}
        self.workspace.append({"files": {}, "training": saved, "state": entry})
        if self._stopped is not None:
            raise self._stopped
