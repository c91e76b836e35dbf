"""The result as loaders will meet it, and which of them take it."""

from __future__ import annotations

from collections.abc import Iterator

from llmshrink.formats.base import Slot
from llmshrink.formats.runtimes import Stored
from llmshrink.forms import Layer, Scheme
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


def _fused_alike(work: Work, schemes: dict[str, Scheme | None]) -> bool:
    """Whether parts of what is fused, and all experts of a block, have one scheme; a part left dense has none."""
    for block in work.model.anatomy.blocks:
        parts: dict[object, set[Scheme | None]] = {}
        for matrix in block.matrices:
            owner, _, leaf = matrix.module.rpartition(".")
            fused = [names for names in FUSED if leaf in names]
            if fused or matrix.kind == "experts":
                key = "experts" if matrix.kind == "experts" else (owner, *sorted(fused[0]))
                parts.setdefault(key, set()).add(schemes.get(matrix.key))
        if any(len(found) > 1 for found in parts.values()):
            return False
    return True
