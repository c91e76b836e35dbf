"""Learning from another model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from llmshrink.io.files import copy_file, write_json
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.training import Training
from llmshrink.train.hidden import Likeness
from llmshrink.train.teachers import Online
from llmshrink.train.trainer import Distiller


class Distillation:
    """A student, whole in float32, and its teacher."""

    task = "distill"
    measure: Literal["kl", "loss"] = "kl"

    def __init__(
        self, training: Training, student: StreamedModel, device: torch.device, kept: Sequence[int] | None = None
    ) -> None:
        """Load both.

        Args:
            training: who learns from whom.
            student: as it is before.
            device: where it will be trained.
            kept: the model's layers that it is made of; None: all.
        """
        self.teacher: str | None = training.teacher.id
        self.model = _load(student.source, student)
        self._student, self._loss = student, training.stage.loss
        teacher = _load(training.teacher, student).requires_grad_(False).eval().to(device)
        self._teacher = Online(teacher)
        spec = training.stage.hidden
        self._hidden = None if spec is None else Likeness(self.model, teacher, training.pairs(kept), spec)

    def trainer(self, **given: Any) -> Distiller:
        """Who makes its steps."""
        return Distiller(teacher=self._teacher, loss=self._loss, hidden=self._hidden, model=self.model, **given)

    def save(self, folder: Path) -> None:
        """Write the student as a checkpoint, in the dtype that it was stored in."""
        source = self._student.source
        if self._hidden is not None:
            self._hidden.remove()
        self.model.to(source.config.dtype or torch.float32).save_pretrained(folder)
        write_json(folder / "config.json", source.config_dict)
        for name, path in source.companions.items():
            copy_file(path, folder / name)


def _load(source: Source, like: StreamedModel) -> PreTrainedModel:
    model: PreTrainedModel = like.task.loader.from_pretrained(
        source.folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    )
    return model
