"""Which layer of a teacher each layer of its student is drawn to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from llmshrink.errors import PlanError
from llmshrink.recipe.modes import HiddenSpec


def layer_pairs(spec: HiddenSpec, student: int, teacher: int, kept: Sequence[int] | None) -> Mapping[int, int]:
    """Layers of the student, each with the teacher's whose output its own is drawn to.

    A layer of a student that layers were dropped from must now give what enters the next one that was kept: the output
    of the teacher's layer before that.

    Args:
        spec: what the recipe says.
        student: how many layers it has.
        teacher: how many its teacher has.
        kept: the teacher's layers that the student is made of; None: it is another model.

    Raises:
        PlanError: a layer is named that is not there.
    """
    if isinstance(spec.layers, dict):
        _check(spec.layers, student, "student")
        _check(spec.layers.values(), teacher, "teacher")
        return spec.layers
    if kept is not None:
        return dict(enumerate([after - 1 for after in kept[1:]] + [teacher - 1]))
    return {layer: max(0, round((layer + 1) * teacher / student) - 1) for layer in range(student)}


def _check(named: Iterable[int], there: int, who: str) -> None:
    gone = sorted({layer for layer in named if layer >= there})
    if gone:
        raise PlanError(
            f"hidden.layers names layer {gone[0]} of the {who}, which has {there}, from 0 to {there - 1}.",
            hint="Name others, or leave it out: `auto` finds a layer for each.",
        )
