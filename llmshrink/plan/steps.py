"""How many steps of gradient there are, of how many tokens, and how many rows they need."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from llmshrink import ranks
from llmshrink.errors import PlanError
from llmshrink.io.texts import text_file
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.layout import row_length
from llmshrink.plan.trackers import check_trackers
from llmshrink.recipe.train import TrainSpec

LENGTH = 512  # tokens in a row, where nobody says how many
ENDLESS = 1 << 20  # tokens of a text without end, where no limit says how many
LOGITS = 64 << 20  # bytes of one model's logits that are in memory at a time while a loss is found
MADE = ("auto", "generator", "self")  # texts that are plain
FEW = 20  # rows of which none are held back


@dataclass(frozen=True)
class Steps:
    """The steps of one training, by what the recipe says of them."""

    spec: TrainSpec
    model: StreamedModel
    processes: int = field(default_factory=ranks.count)  # that share each step

    def check(self) -> None:
        """Refuse what cannot be trained on, and whom nobody can tell of it.

        Raises:
            InputError: the text is no file that is there.
            PlanError: a tracker is not installed, the text has no such entries, or limits leave no step or no row.
        """
        check_trackers(self.spec.report_to)
        if self.spec.kind in ("prompt", "chat") and self.spec.data in MADE[1:]:
            raise PlanError(f"What {self.spec.data} gives is plain text: train.kind cannot be {self.spec.kind}.")
        if ranks.first():  # the others read what it writes
            text_file(self.spec.data)
        self._check_patience()
        if self.spec.packing and (self.spec.kind == "text" or self.spec.data in MADE):
            self._check_step(self.length)  # rows will be full

    def check_rows(self, rows: int, tokens: int) -> None:
        """Refuse rows that do not go with the limits, before anything is made for them.

        Raises:
            PlanError: as `held` and `count`.
        """
        self.held(rows)
        self.count(rows, tokens)

    def _check_step(self, width: float) -> None:
        """Refuse a single step of more tokens than all may be; its rows have so many, on average."""
        most, needed = self.spec.max_tokens, int(self.per_step * width)
        if most is not None and needed > most:
            raise PlanError(
                f"One step is {needed:,} tokens ({self.per_step} rows of {width:.0f}), and train.max_tokens allows "
                f"{most:,}.",
                hint="Raise it (--max-tokens), or lower train.batch, train.accumulate or train.length.",
            )

    def _check_patience(self) -> None:
        spec = self.spec
        if spec.patience is not None and not (spec.hold and spec.evaluations):
            raise PlanError(
                f"train.patience {spec.patience} waits for a gain on rows held back: it takes train.hold (here "
                f"{spec.hold}) and train.evaluations (here {spec.evaluations}).",
                hint="Raise them, or leave out train.patience.",
            )

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
        """Steps of gradient that the recipe allows, if rows are full; None: as many as the rows give."""
        return self._limit(self.length)

    def _limit(self, width: float) -> int | None:
        """The same of rows of so many tokens, on average."""
        most = self.spec.max_tokens
        if self.endless:
            most = ENDLESS
        by_tokens = None if most is None else int(most // (self.per_step * width))
        known = [limit for limit in (self.spec.max_steps, by_tokens) if limit is not None]
        return max(1, min(known)) if known else None

    @property
    def endless(self) -> bool:
        """Whether neither the text nor the recipe says how long to train."""
        spec = self.spec
        return spec.max_steps is None and spec.max_tokens is None and spec.data in MADE

    @property
    def rows(self) -> int:
        """How many full rows can be needed of a text that has no end."""
        assert self.limit is not None
        return self._needed(self.limit)

    def enough(self, rows: int, tokens: int) -> bool:
        """Whether more than so many rows of so many tokens cannot be needed: fewer are seen more often."""
        limit = self._limit(tokens / rows)
        return limit is not None and rows >= self._needed(limit)

    def _needed(self, steps: int) -> int:
        return math.ceil(steps * self.per_step / (1 - self.spec.hold))

    def count(self, rows: int, tokens: int | None = None) -> int:
        """Steps of gradient on so many rows, which have so many tokens; None: they are full.

        Raises:
            PlanError: one step is more tokens than all may be.
        """
        width = self.length if tokens is None else tokens / rows
        self._check_step(width)
        return self._limit(width) or max(1, math.ceil(self.spec.epochs * rows / self.per_step))

    def held(self, rows: int) -> int:
        """How many of so many rows are held back: whole batches of all processes, none of a few.

        A batch that is short is filled with rows that were measured before, where several processes share it.

        Raises:
            PlanError: none are, and somebody waits for what they show.
        """
        spec, each = self.spec, self.spec.batch * self.processes
        if rows >= FEW and spec.hold:
            return min(rows // 2, max(each, round(spec.hold * rows) // each * each))
        if spec.patience is not None:
            raise PlanError(
                f"train.patience {spec.patience} waits for a gain on rows held back, and of {rows} rows none are: "
                f"train.hold is {spec.hold}, and it takes {FEW} rows.",
                hint="Give more text or shorter rows (train.length), or leave out train.patience.",
            )
        return 0
