"""Quality of a model on token rows: perplexity, divergence from the original, agreement on the first choice.

The rows arrive in batches from any forward pass. Sums are kept per row, so that two models scored on the same rows
can be compared pair by pair.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from llmshrink.errors import InputError

CHUNK_BYTES = 32 * 2**20  # one float32 copy of a (chunk x vocabulary) slice of the logits


class Scores:
    """Sums over batches of rows, one entry per row.

    Attributes:
        tokens_rows: Tokens predicted in each row: its length minus one.
        nll_rows: Negative log likelihood of each row's tokens, summed, nats.
        kl_rows: KL(reference || model), summed over each row's tokens, nats; empty without a reference.
        top1_rows: Tokens of each row where model and reference rank the same token first; empty without a reference.
    """

    def __init__(self) -> None:
        self.tokens_rows: list[int] = []
        self.nll_rows: list[float] = []
        self.kl_rows: list[float] = []
        self.top1_rows: list[int] = []
        self._rows, self._start = slice(0, 0), 0  # begun last, and how many positions were added

    def update(self, logits: Tensor, tokens: Tensor, reference: Tensor | None = None) -> None:
        """Add a batch of rows.

        Args:
            logits: The model's [B, T, V], any float dtype.
            tokens: The token ids [B, T], T >= 2; position t predicts token t + 1.
            reference: The original's logits [B, T, V], given with every batch or with none.

        Raises:
            InputError: Logits that are not finite, a row of fewer than 2 tokens, or a reference with some batches only.
        """
        self.begin(len(tokens))
        self.add(logits[:, :-1], tokens[:, 1:], None if reference is None else reference[:, :-1])

    def begin(self, rows: int) -> None:
        """Start a batch of rows."""
        self._rows, self._start = slice(len(self.tokens_rows), len(self.tokens_rows) + rows), 0
        self.tokens_rows += [0] * rows
        self.nll_rows += [0.0] * rows

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Add the next stretch of positions to the rows begun last: not all logits of long rows fit into memory.

        Args:
            logits: The model's [B, t, V].
            targets: The ids [B, t] that these positions predict.
            reference: The original's logits [B, t, V].
        """
        if targets.shape[1] < 1:
            raise InputError(f"row {self._rows.start} has 1 token: a score needs at least 2")
        if reference is not None and self._start == 0 and len(self.kl_rows) == self._rows.start:
            self.kl_rows += [0.0] * len(targets)
            self.top1_rows += [0] * len(targets)
        if len(self.kl_rows) != (0 if reference is None else len(self.tokens_rows)):
            raise InputError("a reference was given with some batches only: give it with all, or with none")
        for i, row in enumerate(range(self._rows.start, self._rows.stop)):
            self._add_stretch(row, logits[i], targets[i], None if reference is None else reference[i])
        self._start += targets.shape[1]

    def _add_stretch(self, row: int, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        chunk = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
        self.tokens_rows[row] += len(targets)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            model = self._log_probabilities(logits[part], "the model", row, start)
            self.nll_rows[row] -= model.gather(-1, targets[part, None].to(model.device)).sum(dtype=torch.float64).item()
            if reference is not None:
                original = self._log_probabilities(reference[part].to(model.device), "the reference", row, start)
                self.top1_rows[row] += int((model.argmax(-1) == original.argmax(-1)).sum().item())
                gap = torch.sub(original, model, out=model)
                self.kl_rows[row] += gap.mul_(original.exp_()).sum(dtype=torch.float64).item()

    def _log_probabilities(self, logits: Tensor, whose: str, row: int, start: int) -> Tensor:
        """float32 [chunk, V]. One NaN makes both extremes NaN, so two numbers tell whether all are finite."""
        if not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(logits)):
            bad = int((~logits.isfinite()).any(-1).nonzero()[0].item()) + start + self._start
            raise InputError(
                f"the logits of {whose} are not finite at row {row}, position {bad}",
                hint="look for weights that are NaN or too large for the compute dtype",
            )
        return torch.log_softmax(logits, -1, dtype=torch.float32)

    @property
    def tokens(self) -> int:
        """Tokens predicted in all rows."""
        return sum(self.tokens_rows)

    @property
    def nll(self) -> float:
        """Mean negative log likelihood, nats per token."""
        return sum(self.nll_rows) / self.tokens

    @property
    def perplexity(self) -> float:
        """Token perplexity, exp of the mean negative log likelihood; the largest float where that overflows."""
        return math.exp(self.nll) if self.nll < math.log(sys.float_info.max) else sys.float_info.max

    @property
    def kl(self) -> float | None:
        """Mean KL(reference || model), nats per token; None without a reference."""
        return sum(self.kl_rows) / self.tokens if self.kl_rows else None

    @property
    def top1(self) -> float | None:
        """Share of tokens where model and reference rank the same token first; None without a reference."""
        return sum(self.top1_rows) / self.tokens if self.top1_rows else None


def bootstrap_ratio(
    a_rows: list[float], b_rows: list[float], seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """Ratio of two models' mean scores on the same rows, with a 95 % interval.

    Rows are drawn with replacement, the same for both models (paired percentile bootstrap, Efron and Tibshirani 1993,
    chapter 13). The tokens of a row are the same for both, so they cancel: sums and means have one ratio.

    Args:
        a_rows: Sums per row of the first model, e.g. its `kl_rows`.
        b_rows: The second model's, the same rows in the same order.
        seed: Of the draws.
        draws: How many times the rows are drawn.

    Returns:
        The ratio of the sums, the 2.5 % and the 97.5 % quantile.

    Raises:
        InputError: The two do not hold the same number of rows, hold none, or the second sums to 0.
    """
    if len(a_rows) != len(b_rows) or not a_rows:
        raise InputError(f"a paired comparison needs the same rows twice: got {len(a_rows)} and {len(b_rows)}")
    if sum(b_rows) == 0:
        raise InputError("the second model's scores sum to 0: there is no ratio to it")
    pairs = torch.tensor([a_rows, b_rows], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(a_rows), (draws, len(a_rows)), generator=generator)
    sums = pairs[:, drawn].sum(-1)
    low, high = torch.quantile(sums[0] / sums[1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return sum(a_rows) / sum(b_rows), low, high


__all__ = ["Scores", "bootstrap_ratio"]
