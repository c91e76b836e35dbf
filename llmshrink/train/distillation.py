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
from llmshrink.train.alignment import Alignment
from llmshrink.train.heads import Halves
from llmshrink.train.hidden import Likeness
from llmshrink.train.teachers import Foreign, Online
from llmshrink.train.trainer import Distiller
from llmshrink.train.uld import Shared


class Distillation:
    """A student, whole in float32, and its teacher."""

    task = "distill"

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
        self.teacher: str | None = training.taught_by
        self.model = _load(student.source, student)
        self._student, self._stage = student, training.stage
        self._teacher: Online | None = None
        self._hidden: Likeness | None = None
        self._shared: Shared | None = None
        self.measure: Literal["kl", "loss"] = "loss" if training.foreign else "kl"
        if training.stage.alone:
            return
        teacher = _load(training.teacher, student).requires_grad_(False).eval().to(device)
        self._teacher = self._foreign(teacher, training.teacher) if training.foreign else Online(teacher)
        if training.stage.hidden is not None:
            self._hidden = Likeness(self.model, self._teacher, training.pairs(kept), training.stage.hidden)

    def _foreign(self, model: PreTrainedModel, source: Source) -> Foreign:
        """A teacher that reads other tokens."""
        alignment = Alignment(self._student.source.tokenizer, source.tokenizer)
        teacher = Foreign(model, alignment)
        if self._stage.loss.shared:
            sizes = Halves(self.model).vocabulary, teacher.vocabulary
            classes = zip(alignment.classes(), sizes, strict=True)
            self._shared = Shared(*(torch.tensor((found + [-1] * n)[:n], device=model.device) for found, n in classes))
        return teacher

    @property
    def aligned(self) -> float | None:
        """Of a teacher that reads other tokens, the share of the positions at which it could say something."""
        asked, answered = map(int, self._teacher.seen) if isinstance(self._teacher, Foreign) else (0, 0)
        return answered / asked if asked else None

    def trainer(self, **given: Any) -> Distiller:
        """Who makes its steps."""
        return Distiller(
            teacher=self._teacher,
            loss=self._stage.loss,
            hidden=self._hidden,
            policy=self._stage.policy,
            shared=self._shared,
            exits=self._stage.exits or (),
            model=self.model,
            **given,
        )

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
