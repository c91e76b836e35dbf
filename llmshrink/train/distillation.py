"""Learning from another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from llmshrink.io.files import copy_file, write_json
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.training import Training
from llmshrink.plan.zeros import matrices_of
from llmshrink.report.schema import TrainReport
from llmshrink.train.teachers import Online
from llmshrink.train.trainer import Distiller
from llmshrink.train.zeros import Zeros


class Distillation:
    """A student, whole in float32, and its teacher."""

    task = "distill"
    measure: Literal["kl", "loss"] = "kl"

    def __init__(self, training: Training, student: StreamedModel, device: torch.device) -> None:
        """Load both.

        Args:
            training: who learns from whom.
            student: as it is before.
            device: where it will be trained.
        """
        self.teacher: str | None = training.teacher.id
        self.model = _load(student.source, student).requires_grad_(True)
        self._names = list(dict.fromkeys(matrix.parameter for matrix in matrices_of(student)))  # that may be pruned
        self.zeros = Zeros(self.model, self._names, training.stage.train.keep_zeros)
        self._student, self._loss = student, training.stage.loss
        teacher = _load(training.teacher, student).requires_grad_(False).eval().to(device)
        self._teacher = Online(teacher)

    def trainer(self, **given: Any) -> Distiller:
        """Who makes its steps."""
        return Distiller(teacher=self._teacher, loss=self._loss, zeros=self.zeros, model=self.model, **given)

    def tell(self, report: TrainReport) -> TrainReport:
        """The report, with the zeros that stayed."""
        return report.model_copy(update={"zeros": self.zeros.report(self.model)})

    def save(self, folder: Path) -> None:
        """Write the student as a checkpoint, in the dtype that it was stored in."""
        source = self._student.source
        self.model.to(source.config.dtype or torch.float32).save_pretrained(folder)
        plain = {key: value for key, value in source.config_dict.items() if key != "quantization_config"}
        write_json(folder / "config.json", plain)
        for name, path in source.companions.items():
            copy_file(path, folder / name)


def _load(source: Source, like: StreamedModel) -> PreTrainedModel:
    """A model as transformers loads it; decoded where it is `like` itself and stored without its zeros."""
    if source is like.source and like.weights.compressed:
        return like.whole(torch.float32)
    model: PreTrainedModel = like.task.loader.from_pretrained(
        source.folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    )
    return model
