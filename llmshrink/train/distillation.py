"""Learning from another model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from llmshrink.io.files import copy_file, write_json
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.training import Training
from llmshrink.plan.zeros import matrices_of
from llmshrink.progress import Progress
from llmshrink.recipe.distill import DistillStage
from llmshrink.report.schema import TrainReport
from llmshrink.train.alignment import Alignment
from llmshrink.train.cache import Cached
from llmshrink.train.caching import cache_of
from llmshrink.train.data import Examples
from llmshrink.train.heads import Halves
from llmshrink.train.hidden import Likeness
from llmshrink.train.teachers import Foreign, Online, Teacher
from llmshrink.train.trainer import Distiller
from llmshrink.train.uld import Shared
from llmshrink.train.zeros import Zeros


class Distillation:
    """A student, whole in float32, and its teacher."""

    task = "distill"

    def __init__(
        self,
        training: Training,
        student: StreamedModel,
        device: torch.device,
        *,
        kept: Sequence[int] | None,
        examples: Examples,
        work: Path,
        progress: Progress,
    ) -> None:
        """Load both; or the student alone, once what the teacher says of the rows is written down.

        Args:
            training: who learns from whom.
            student: as it is before.
            device: where it will be trained.
            kept: the model's layers that it is made of; None: all.
            examples: to learn from.
            work: the run's folder of work.
            progress: told of the rows that the teacher has seen.

        Raises:
            InputError: the cache is not one that it can learn from.
        """
        self.teacher: str | None = training.taught_by
        self.measure: Literal["kl", "loss"] = "loss" if training.foreign else "kl"
        self.loss = in_words(training.stage)
        self._student, self._stage = student, training.stage
        cache = None if training.keeping is None else cache_of(training.keeping, examples, work, device, progress)
        self._cache = None if cache is None else cache.report()
        self.model = _load(student.source, student).requires_grad_(True)
        self._names = list(dict.fromkeys(matrix.parameter for matrix in matrices_of(student)))  # that may be pruned
        self._zeros = Zeros(self.model, self._names, training.stage.train.keep_zeros)
        self._teacher: Teacher | None = None if cache is None else Cached(cache)
        self._hidden: Likeness | None = None
        self._shared: Shared | None = None
        if training.teacher is None or training.stage.alone or cache is not None:
            return
        teacher = _load(training.teacher, student).requires_grad_(False).eval().to(device)
        self._teacher = found = self._foreign(teacher, training.teacher) if training.foreign else Online(teacher)
        if training.stage.hidden is not None:
            self._hidden = Likeness(self.model, found, training.pairs(kept), training.stage.hidden)

    def _foreign(self, model: PreTrainedModel, source: Source) -> Foreign:
        """A teacher that reads other tokens."""
        alignment = Alignment(self._student.source.tokenizer, source.tokenizer)
        teacher = Foreign(model, alignment)
        if self._stage.loss.shared:
            sizes = Halves(self.model).vocabulary, teacher.vocabulary
            classes = zip(alignment.classes(), sizes, strict=True)
            self._shared = Shared(*(torch.tensor((found + [-1] * n)[:n], device=model.device) for found, n in classes))
        return teacher

    def trainer(self, **given: Any) -> Distiller:
        """Who makes its steps."""
        return self._made(Distiller, **given)

    def _made(self, kind: type[Distiller], **given: Any) -> Distiller:
        return kind(
            teacher=self._teacher,
            loss=self._stage.loss,
            hidden=self._hidden,
            policy=self._stage.policy,
            shared=self._shared,
            exits=self._stage.exits or (),
            zeros=self._zeros,
            model=self.model,
            **given,
        )

    def as_it_was(self) -> AbstractContextManager[Any]:
        """The student, which nothing stands beside."""
        return nullcontext()

    def tell(self, report: TrainReport) -> TrainReport:
        """The report, with the zeros that stayed, the cache, and how much a foreign teacher could say."""
        found = {"zeros": self._zeros.report(self.model), "cache": self._cache, "aligned": self._aligned}
        return report.model_copy(update=found)

    @property
    def _aligned(self) -> float | None:
        """Of a teacher that reads other tokens, the share of the positions at which it could say something."""
        asked, answered = map(int, self._teacher.seen) if isinstance(self._teacher, Foreign) else (0, 0)
        return answered / asked if asked else None

    def save(self, folder: Path) -> None:
        """Write the student as a checkpoint, in the dtype that it was stored in."""
        source = self._student.source
        if self._hidden is not None:
            self._hidden.remove()
        self.model.to(source.config.dtype or torch.float32).save_pretrained(folder)
        plain = {key: value for key, value in source.config_dict.items() if key != "quantization_config"}
        write_json(folder / "config.json", plain)
        for name, path in source.companions.items():
            copy_file(path, folder / name)


def in_words(stage: DistillStage) -> str:
    """What the steps of a distillation make small."""
    spec, text = stage.loss, "cross entropy of the text"
    if spec.alpha == 0:
        return text
    names = {"kl": "KL(teacher || student)", "reverse-kl": "KL(student || teacher)", "jsd": "Jensen-Shannon divergence"}
    soft = "" if spec.temperature == 1 else f" at temperature {spec.temperature:g}, times {spec.temperature**2:g}"
    found = names.get(spec.name, spec.name) + soft
    if spec.alpha < 1:
        found = f"{spec.alpha:g} of {found}, and {text}"
    return found if stage.hidden is None else f"{found}, and distances of states"


def _load(source: Source, like: StreamedModel) -> PreTrainedModel:
    """A model as transformers loads it; decoded where it is `like` itself and stored without its zeros."""
    if source is like.source and like.weights.compressed:
        return like.whole(torch.float32)
    model: PreTrainedModel = like.task.loader.from_pretrained(
        source.folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    )
    return model
