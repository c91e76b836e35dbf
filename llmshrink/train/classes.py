"""Rows with a class each, to learn from: in memory, as they were read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from llmshrink.calibration.labelled import Labelled
from llmshrink.report.schema import TextReport


@dataclass(frozen=True)
class Classified:
    """What is there to learn from, as `Examples`."""

    rows: Labelled

    def __len__(self) -> int:
        return len(self.rows.tokens)

    @property
    def told(self) -> TextReport:
        """What a report says about them."""
        rows = self.rows
        numbers = {"rows": len(self), "length": rows.length, "tokens": rows.count, "counted": len(self)}
        origin = {"data": rows.data, "origin": rows.origin, "split": rows.split or "train", "kind": "classes"}
        return TextReport.model_validate({**origin, **numbers, "fingerprint": rows.fingerprint})

    def parts(self, held: int) -> tuple[ClassPart, ClassPart]:
        """The rows to learn from, and the last `held`, which are measured."""
        first = len(self) - held
        return ClassPart(self.rows, range(first)), ClassPart(self.rows, range(first, len(self)))


class ClassPart(Dataset[dict[str, Any]]):
    """Some of the rows, one after another."""

    def __init__(self, rows: Labelled, which: range) -> None:
        self._rows, self._which = rows, which

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Ids, int64 [length], and the number of the class."""
        row = self._which[index]
        return {"input_ids": self._rows.tokens[row], "labels": self._rows.labels[row]}

    @property
    def counted(self) -> int:
        """Places at which the loss is taken: one of each row."""
        return len(self)
