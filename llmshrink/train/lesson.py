"""What a training is of: a model that learns, by steps that know their loss, and how it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

from transformers import PreTrainedModel, Trainer


class Lesson(Protocol):
    """One task that trains."""

    task: str  # as people are told of it
    teacher: str | None  # its name
    measure: Literal["kl", "loss"]  # of rows held back
    model: PreTrainedModel  # that learns, on the CPU

    @property
    def aligned(self) -> float | None:
        """Of a teacher that reads other tokens, the share of positions at which it could say something."""
        ...

    def trainer(self, **given: Any) -> Trainer:
        """Who makes its steps; `given` is all that does not depend on the task."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was learned into an empty folder, such that it loads."""
        ...
