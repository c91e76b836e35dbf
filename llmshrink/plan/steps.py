"""How many steps of gradient there are, of how many tokens, and how many rows they need."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from llmshrink import ranks
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.layout import row_length
from llmshrink.recipe.train import TrainSpec

LENGTH = 512  # tokens in a row, where nobody says how many
MANY = 1 << 20  # rows, where no limit says how many are needed
LOGITS = 64 << 20  # bytes of one model's logits that are in memory at a time while a loss is found
FEW = 20  # rows of which none are held back


@dataclass(frozen=True)
class Steps:
    """The steps of one training, by what the recipe says of them."""

    spec: TrainSpec
    model: StreamedModel
    processes: int = field(default_factory=ranks.count)  # that share each step

    @property
    def length(self) -> int:
        """Tokens in a row to train on."""
        return row_length(self.spec.length or LENGTH, self.model, [])

    @property
    def per_step(self) -> int:
        """Rows in a step of gradient, of all processes."""
        return self.spec.batch * self.spec.accumulate * self.processes

    @property
    def limit(self) -> int | None:
        """Steps of gradient that the recipe allows; None: as many as the rows give."""
        by_tokens = None if self.spec.max_tokens is None else self.spec.max_tokens // (self.per_step * self.length)
        known = [limit for limit in (self.spec.max_steps, by_tokens) if limit is not None]
        return max(1, min(known)) if known else None

    @property
    def rows(self) -> int:
        """How many rows can be needed: fewer are seen more often."""
        return MANY if self.limit is None else math.ceil(self.limit * self.per_step / (1 - self.spec.hold))

    def count(self, rows: int) -> int:
        """Steps of gradient on so many rows."""
        return self.limit or max(1, math.ceil(self.spec.epochs * rows / self.per_step))

    def held(self, rows: int) -> int:
        """How many of so many rows are held back: whole batches, none of a few."""
        if rows < FEW or not self.spec.hold:
            return 0
        return min(rows // 2, max(self.spec.batch * self.processes, round(self.spec.hold * rows)))
