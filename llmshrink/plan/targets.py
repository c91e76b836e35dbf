"""What a stage compresses of a model: the linears of its blocks, its embedding, its head."""

from __future__ import annotations

import re
from typing import TypeVar

from llmshrink.errors import PlanError
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.recipe.stages import MatrixStage, Target

S = TypeVar("S", bound=MatrixStage)
OUTSIDE: dict[str, Target] = {"embedding": "embedding", "head": "head"}  # by the kind of a matrix; others are linears


def kind_of(matrix: Matrix) -> Target:
    """What a recipe calls a matrix."""
    return OUTSIDE.get(matrix.kind, "linears")


def with_names(stage: S, model: StreamedModel) -> S:
    """The stage with the embedding and the head by their own names, where `layers` and `ignore` say just that."""
    anatomy = model.anatomy
    found = {"embedding": anatomy.embedding, "head": anatomy.embedding if anatomy.tied else anatomy.head}
    known = {word: re.escape(matrix.name) for word, matrix in found.items() if matrix is not None}
    both = [stage.layers.get(word) for word in ("embedding", "head")]
    if anatomy.tied and all(word in stage.layers for word in ("embedding", "head")) and both[0] != both[1]:
        raise PlanError(
            "`layers` says two things of the embedding and the head, and they are one matrix.",
            hint="Leave out one of the two words.",
        )
    layers = {known.get(pattern, pattern): keys for pattern, keys in stage.layers.items()}
    return stage.model_copy(update={"layers": layers, "ignore": [known.get(p, p) for p in stage.ignore]})


def targeted(stage: MatrixStage, model: StreamedModel) -> list[Matrix]:
    """The matrices that a stage names, in the order of the forward pass, a tied one once.

    Raises:
        PlanError: the model has nothing of a kind that is named.
    """
    anatomy = model.anatomy
    asked = {"embedding" if name == "head" and anatomy.tied else name for name in stage.aims}
    there = {kind_of(matrix) for matrix in anatomy.matrices}
    if missing := sorted(asked - there):
        raise PlanError(
            f"`targets` names {' and '.join(missing)}, and {_why(missing[0], model)}.",
            hint=f"What can be compressed of it: {', '.join(sorted(there, reverse=True))}.",
        )
    return [matrix for matrix in anatomy.matrices if kind_of(matrix) in asked]


def _why(name: str, model: StreamedModel) -> str:
    """What the model has in place of it."""
    cls = model.model
    module = cls.get_input_embeddings() if name == "embedding" else cls.get_output_embeddings()
    kind = "no such part" if module is None else f"a {type(module).__name__} that is no one matrix on disk"
    return f"{type(cls).__name__} has {kind}"
