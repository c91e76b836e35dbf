"""What training left of a matrix, as it is, or without the zeros that it was stored without before.

No recipe names it as a method: the stages that train do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from llmshrink.forms import Dense, Form, Layer, Sparse
from llmshrink.methods.base import Prepared, Task
from llmshrink.methods.cut import Cut, CutConfig


class Trained(Cut):
    """One matrix of a model that was trained as a whole: like what a surgery left, somebody else has made it."""

    task: ClassVar[Task] = "distill"


class TrainedSparse(Trained):
    """One whose zeros stayed. Not pure like other methods: it looks at the file for where they are."""

    def __init__(self, read: Callable[[], Form]) -> None:
        """`read` gives the form that the matrix had before: floats of which some are dropped."""
        super().__init__(CutConfig())
        self._read, form = read, read()
        assert isinstance(form, Sparse)
        self._kept, self._pattern = form.kept, form.pattern

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """The weights [out, in] that were kept before."""
        stored = self._read()
        assert isinstance(stored, Sparse)
        mask = stored.mask.to(weight.device)
        return Layer(Sparse(mask, Dense(weight * mask), self._kept, self._pattern))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        mask = torch.empty(shape, dtype=torch.bool, device="meta")
        values = Dense(torch.empty(shape, dtype=dtype, device="meta"))
        return Layer(Sparse(mask, values, self._kept, self._pattern))
