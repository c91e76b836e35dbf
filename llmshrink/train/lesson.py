"""What a training is of: a model that learns, by steps that know their loss, and how it is kept."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

from transformers import PreTrainedModel, Trainer

from llmshrink.report.schema import TrainReport


class Lesson(Protocol):
    """One task that trains."""

    task: str  # as people are told of it
    teacher: str | None  # its name
    measure: Literal["kl", "loss"]  # of rows held back
    loss: str  # of the steps, in words
    model: PreTrainedModel  # that learns, on the CPU

    def trainer(self, **given: Any) -> Trainer:
        """Who makes its steps; `given` is all that does not depend on the task."""
        ...

    def as_it_was(self) -> AbstractContextManager[Any]:
        """Within it, before the first step, the model says what it said before anything was put beside it."""
        ...

    def tell(self, report: TrainReport) -> TrainReport:
        """The report of the steps, with what only this task knows, once they are done."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was learned into an empty folder, such that it loads."""
        ...
