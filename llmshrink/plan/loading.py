"""The result as loaders will meet it, and which of them take it."""

from __future__ import annotations

from collections.abc import Iterator

from llmshrink.formats.base import Slot
from llmshrink.formats.runtimes import Stored
from llmshrink.forms import Layer, Scheme
from llmshrink.model.anatomy import Block, Matrix
from llmshrink.plan.work import Work

# Linears that vLLM holds as one: their parts must be stored alike.
FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def layers(work: Work) -> Iterator[tuple[Slot, Layer]]:
    """Every compressed matrix without data."""
    for matrix in work.methods:
        yield work.slots[matrix], work.form(matrix)


def stored(work: Work) -> Stored:
    """What the table of runtimes looks at."""
    schemes = {slot.key: layer.scheme for slot, layer in layers(work)}
    return Stored(
        format=work.format.name,
        kinds=frozenset(matrix.kind for matrix in work.methods),
        schemes=frozenset(scheme for scheme in schemes.values() if scheme is not None),
        fused_alike=_fused_alike(work, schemes),
        head=any(matrix.kind == "head" for matrix in work.methods),
        model_type=work.model.source.config.model_type,
        causal=work.model.task.causal,
    )


def fused(block: Block) -> Iterator[list[Matrix]]:
    """The matrices of a block that vLLM holds as one: parts of what is fused, and all experts."""
    parts: dict[object, list[Matrix]] = {}
    for matrix in block.matrices:
        owner, _, leaf = matrix.module.rpartition(".")
        names = next((names for names in FUSED if leaf in names), None)
        if matrix.kind == "experts":
            parts.setdefault("experts", []).append(matrix)
        elif names:
            parts.setdefault((owner, *sorted(names)), []).append(matrix)
    yield from parts.values()


def _fused_alike(work: Work, schemes: dict[str, Scheme | None]) -> bool:
    """Whether what is fused has one scheme; a part left dense has none."""
    blocks = work.model.anatomy.blocks
    return all(len({schemes.get(m.key) for m in alike}) == 1 for block in blocks for alike in fused(block))
