"""How near a model's output is to the original's, where no next token is predicted and so nothing has a perplexity.

Classes, and the tokens behind a mask, are compared as distributions: divergence and agreement on the first choice.
Hidden states, and scores that are no distribution, are compared as vectors: cosine similarity and relative error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmshrink.errors import InputError


class Agreement:
    """Sums over batches of rows. Each token has a result, or each row has one.

    Attributes:
        results_rows: Results in each row.
        kl_rows: KL(original || model), summed over each row's results, nats; stays empty for vectors.
    """

    def __init__(self, *, distribution: bool) -> None:
        """`distribution`: the softmax of an output says how likely each of its places is."""
        self._distribution = distribution
        self.results_rows: list[int] = []
        self.kl_rows: list[float] = []
        self._same = 0  # first choices
        self._width = 0
        self._cosine = self._error = self._norm = 0.0  # sums over results; of squares but for the first

    def begin(self, rows: int) -> None:
        """Start a batch of rows."""
        self._first = len(self.results_rows)
        self.results_rows += [0] * rows
        self.kl_rows += [0.0] * (rows if self._distribution else 0)

    def add(self, output: Tensor, original: Tensor) -> None:
        """Add the next stretch of the rows begun last.

        Args:
            output: The model's [B, t, width], any float dtype.
            original: The original's, of the same shape.

        Raises:
            InputError: Values that are not finite.
        """
        for row, (a, b) in enumerate(zip(output, original.to(output.device), strict=True), start=self._first):
            for values, whose in ((a, "the model"), (b, "the original")):
                if not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(values)):
                    raise InputError(
                        f"the output of {whose} is not finite in row {row}",
                        hint="look for weights that are NaN or too large for the compute dtype",
                    )
            self.results_rows[row] += len(a)
            if self._distribution:
                self._add_distributions(row, a, b)
            else:
                self._add_vectors(a.double(), b.double())

    def _add_distributions(self, row: int, output: Tensor, original: Tensor) -> None:
        model, reference = (torch.log_softmax(logits, -1, dtype=torch.float32) for logits in (output, original))
        self._same += int((model.argmax(-1) == reference.argmax(-1)).sum().item())
        self.kl_rows[row] += ((reference - model) * reference.exp()).sum(dtype=torch.float64).item()

    def _add_vectors(self, output: Tensor, original: Tensor) -> None:
        self._width = output.shape[-1]
        self._cosine += torch.cosine_similarity(output, original, -1).sum().item()
        self._error += (output - original).square().sum().item()
        self._norm += original.square().sum().item()

    @property
    def results(self) -> int:
        """Results compared in all rows."""
        return sum(self.results_rows)

    @property
    def kl(self) -> float | None:
        """Mean KL(original || model), nats per result; None for vectors."""
        return sum(self.kl_rows) / self.results if self._distribution else None

    @property
    def top1(self) -> float | None:
        """Share of results where both rank the same place first; None for vectors."""
        return self._same / self.results if self._distribution else None

    @property
    def cosine(self) -> float | None:
        """Mean cosine similarity; None for distributions, and for single numbers, which have only a sign."""
        return None if self._distribution or self._width == 1 else self._cosine / self.results

    @property
    def relative_error(self) -> float | None:
        """||model - original|| / ||original|| over all results; None for distributions, and where it gives 0."""
        return None if self._distribution or not self._norm else math.sqrt(self._error / self._norm)
