"""The result of compressing one matrix, and of matrices stacked on top of each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmshrink.forms.inputs import InputScheme
from llmshrink.forms.kinds import Dense, Form, Quantized, Scheme, Sparse
from llmshrink.forms.parts import combine


@dataclass(frozen=True)
class Event:
    """Something that a run did differently from what the recipe says, or that its reader should know."""

    kind: str  # a stable word: "rtn_fallback", "damping", "dead_columns", ...
    message: str
    layer: str | None = None
    data: dict[str, float] | None = None


@dataclass(frozen=True)
class Objective:
    """The error that a method minimises, and what its baseline makes of the same rows."""

    own: Tensor  # float32 [out]
    baseline: Tensor  # float32 [out]

    @property
    def share(self) -> float:
        """The method's error as a share of its baseline's; 1 where the baseline makes none."""
        total = float(self.baseline.sum())
        return float(self.own.sum()) / total if total else 1.0


@dataclass(frozen=True)
class Layer:
    """The result of compressing one matrix."""

    weight: Form
    objective: Objective | None = None
    events: tuple[Event, ...] = ()
    input: InputScheme | None = None  # None: inputs are not rounded

    @property
    def scheme(self) -> Scheme | None:
        """What a loader must be told to decode it; None where its codes are no multiples of a scale."""
        found = self.weight.scheme if isinstance(self.weight, Quantized) else None
        if found is None or self.input is None:
            return found
        return replace(found, inputs=(self.input.kind, "dynamic" if self.input.scale is None else "static"))


def split_rows(layer: Layer, rows: list[int]) -> list[Layer]:
    """The results of matrices that were compressed stacked on top of each other, `rows` [out] of each."""
    form, objective = layer.weight, layer.objective
    if not _by_row(form):
        raise ValueError("scales that span rows cannot be split by rows")

    def part(number: int) -> Layer:
        def cut(tensor: Tensor) -> Tensor:
            return torch.split(tensor, rows)[number]

        own = None if objective is None else Objective(cut(objective.own), cut(objective.baseline))
        return replace(layer, weight=combine([form], lambda tensors: cut(tensors[0])), objective=own)

    return [part(number) for number in range(len(rows))]


def join_rows(layers: list[Layer]) -> Layer:
    """The result of a matrix that was compressed in stretches of rows: the inverse of `split_rows`; events once."""
    if not all(_by_row(layer.weight) for layer in layers):
        raise ValueError("scales that span rows cannot be joined by rows")
    return stacked(layers)


def stacked(layers: list[Layer]) -> Layer:
    """The same for stretches that share no scales or tables with each other, whatever lies within one; events once."""
    known = [layer.objective for layer in layers if layer.objective is not None]
    objective = Objective(torch.cat([o.own for o in known]), torch.cat([o.baseline for o in known])) if known else None
    return replace(layers[0], weight=combine([layer.weight for layer in layers], torch.cat), objective=objective)


def _by_row(form: Form) -> bool:
    """Whether each row of a form, and of the tables in it, stands for itself."""
    if isinstance(form, Dense):
        return True
    if isinstance(form, Sparse):
        return _by_row(form.values)
    if not isinstance(form, Quantized):
        return False  # tables belong to stretches, a factor to all rows
    own = not isinstance(form.block, int) and form.block[0] == 1
    return own and _by_row(form.scale) and (form.minimum is None or _by_row(form.minimum))
