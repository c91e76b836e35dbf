"""From a compressed checkpoint to the work of writing the same codes in another format."""

from __future__ import annotations

from functools import partial
from typing import Any

from llmshrink.errors import PlanError
from llmshrink.formats import load_format
from llmshrink.formats.base import Format
from llmshrink.formats.own import OwnFormat
from llmshrink.forms import Event
from llmshrink.methods.base import Method
from llmshrink.methods.keep import Keep
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.layout import lay_out, refuse
from llmshrink.plan.work import Work
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import ExportStage


def resolve_export(recipe: Recipe, stage: ExportStage, model: StreamedModel) -> Work:
    """Every compressed matrix keeps its codes; every stored form is looked at once, so that all bytes are known.

    Raises:
        PlanError: nothing is compressed, or the format cannot hold what is stored.
    """
    weights, fmt = model.weights, load_format(stage.format.name)
    methods: dict[Matrix, Method[Any]] = {}
    left: dict[Matrix, str] = {}
    problems: list[str] = []
    events: list[Event] = []
    for matrix in _candidates(model, fmt):
        if matrix.key in weights.compressed:
            rounded = weights.input(matrix.key)
            if rounded is not None and rounded.kind not in fmt.rounded_inputs:
                message = f"inputs are not rounded any more: {fmt.name} cannot say that they are (as {rounded.kind})"
                events.append(Event("exact_inputs", message, matrix.name))
                rounded = None
            scales = None if fmt.name == "dense" else fmt.scale_dtype(matrix.dtype)  # decoded, and rounded once
            methods[matrix] = keep = Keep(partial(weights.form, matrix.key), scales, rounded)
            if why := keep.check(matrix.shape):
                problems.append(f"{matrix.name}: {why}")
        else:
            left[matrix] = "it is stored dense"
    refuse(problems, "choose another format with --to; compressed-tensors keeps the model's own dtype")
    if not methods:
        raise PlanError(
            f"{model.source.id}: nothing of it is compressed that {fmt.name} holds, so there is nothing to export.",
            hint="`llmshrink quantize` compresses a model and writes any format (--format).",
        )
    return lay_out(recipe, model, fmt, methods, {}, left, events, pack=stage.format.pack)


def _candidates(model: StreamedModel, fmt: Format) -> list[Matrix]:
    """The matrices of blocks; an embedding and a head too that are stored as no loader of other formats has them."""
    anatomy, stored = model.anatomy, model.weights.format
    inside = [m for block in anatomy.blocks for m in block.matrices]
    own = isinstance(stored, OwnFormat) and fmt.name in (stored.name, "dense")
    if not own:
        return inside
    return [m for m in anatomy.matrices if m in set(inside) or m.key in model.weights.compressed]
