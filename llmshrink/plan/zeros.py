"""Pruned models that are to be trained: whose zeros are stored as zeros, and whose are not stored at all."""

from __future__ import annotations

from functools import partial
from typing import Any

from llmshrink.errors import PlanError
from llmshrink.forms import Dense, Form, Sparse
from llmshrink.methods.base import Method
from llmshrink.methods.magnitude import Magnitude, MagnitudeConfig
from llmshrink.methods.trained import TrainedSparse
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel


def refuse_codes(model: StreamedModel) -> None:
    """Only floats learn, of which some may be dropped.

    Raises:
        PlanError: something else is stored.
    """
    stored = model.weights.compressed
    floats = not model.source.gguf and all(_is_sparse(model.weights.form(key)) for key in stored)
    if not floats:
        raise PlanError(
            f"{model.source.id} is stored as {model.weights.format.name}: codes cannot be trained.",
            hint="`llmshrink export --to dense` writes it without codes; distill that, and quantize the result.",
        )


def _is_sparse(form: Form) -> bool:
    return isinstance(form, Sparse) and isinstance(form.values, Dense)


def matrices_of(model: StreamedModel) -> list[Matrix]:
    """The matrices in the blocks: what a pruning prunes."""
    return [matrix for block in model.anatomy.blocks for matrix in block.matrices]


def refuse_without_zeros(model: StreamedModel) -> None:
    """Whoever asks that zeros stay has some.

    Raises:
        PlanError: there are none.
    """
    if not any(bool((model.weights.get(m.key) == 0).any()) for m in matrices_of(model)):
        raise PlanError(
            f"{model.source.id} has no zeros that could stay: `keep_zeros` is for pruned models.",
            hint="`llmshrink prune` makes one; or leave out train.keep_zeros.",
        )


def sparse_again(before: StreamedModel, after: StreamedModel) -> dict[Matrix, Method[Any]]:
    """What writes the matrices of a trained model that were stored without their zeros before, in the same way."""
    pairs = zip(matrices_of(before), matrices_of(after), strict=True)  # other names on disk, perhaps
    stored = before.weights
    return {new: TrainedSparse(partial(stored.form, old.key)) for old, new in pairs if old.key in stored.compressed}


def drawn_weights(matrices: list[Matrix], drawn: StreamedModel | None, sparsity: float) -> dict[Matrix, Method[Any]]:
    """What writes matrices of which weights are zero without them; None: nobody knows yet which, only how many."""
    if drawn is None:
        return {matrix: Magnitude(MagnitudeConfig(sparsity=sparsity)) for matrix in matrices}
    return {matrix: TrainedSparse(partial(_without_zeros, drawn, matrix)) for matrix in matrices}


def _without_zeros(model: StreamedModel, matrix: Matrix) -> Form:
    weight = matrix.seen(model.weights.get(matrix.key))
    mask = weight != 0
    return Sparse(mask, Dense(weight), int(mask.sum()))
