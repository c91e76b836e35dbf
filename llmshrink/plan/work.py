"""A plan with the objects that carry it out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.formats.base import Format, Slot
from llmshrink.forms import Event, Layer
from llmshrink.methods.base import Method
from llmshrink.methods.inputs import Inputs
from llmshrink.model.anatomy import Block, Group, Matrix
from llmshrink.model.streamed import BATCH_TOKENS, StreamedModel
from llmshrink.plan.economy import Economy
from llmshrink.statistics import NoStatistic, Range, Statistic


@dataclass
class Work:
    """A plan with the objects that carry it out."""

    model: StreamedModel
    format: Format
    methods: dict[Matrix, Method[Any]]
    slots: dict[Matrix, Slot]
    inputs: dict[Matrix, Inputs]  # whose inputs are to be rounded
    left: dict[Matrix, str]  # matrices that stay as they are, and why
    quantization_config: dict[str, Any] | None
    length: int  # tokens of a calibration row
    output: Path
    shards: dict[int, str] = field(default_factory=dict)  # block index -> file name; -1: all other tensors
    file_bytes: dict[str, int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    economy: Economy = field(default_factory=lambda: Economy(BATCH_TOKENS))  # of the compress step
    scoring: Economy = field(default_factory=lambda: Economy(BATCH_TOKENS))  # of the comparison of both models

    @property
    def needs_data(self) -> bool:
        """Whether any method, or any static scale, looks at calibration text."""
        return any(self.statistic_bytes(group) for block in self.model.anatomy.blocks for group in block.groups)

    def needs(self, group: Group) -> tuple[type[Statistic], ...]:
        """What is gathered of a group: tokens always, what its methods ask for, and the range of static inputs."""
        methods = [self.methods[m].needs for m in group.matrices if m in self.methods]
        static = any(self.inputs[m].observer for m in group.matrices if m in self.inputs)
        return tuple(dict.fromkeys((NoStatistic, *methods, *([Range] if static else []))))

    def statistic_bytes(self, group: Group) -> int:
        """Bytes of all that is gathered of a group."""
        return sum(kind.bytes(group.width) for kind in self.needs(group))

    def form(self, matrix: Matrix) -> Layer:
        """What becomes of a compressed matrix, without data."""
        method, inputs = self.methods[matrix], self.inputs.get(matrix)
        layer = method.form(matrix.shape, matrix.dtype)
        return layer if inputs is None else replace(layer, input=inputs.meta(method.scales or matrix.dtype))

    def meta_tensors(self, block: Block) -> dict[str, Tensor]:
        """All tensors of a block's file, without data."""
        tensors: dict[str, Tensor] = {}
        compressed = {m.key: m for m in block.matrices if m in self.methods}
        for key in block.keys:
            if key in compressed:
                matrix = compressed[key]
                tensors |= self.format.pack(self.slots[matrix], self.form(matrix))
            else:
                tensors[key] = _empty(self.model, key)
        return tensors

    def meta_others(self) -> dict[str, Tensor]:
        """All tensors outside the blocks, without data."""
        anatomy = self.model.anatomy
        return {key: _empty(self.model, key) for key in (*anatomy.others, *anatomy.unused)}


def _empty(model: StreamedModel, key: str) -> Tensor:
    info = model.weights.infos[key]
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def main_method(methods: dict[Matrix, Method[Any]]) -> Method[Any]:
    """The method, with its settings, that most matrices get."""
    counted = Counter((type(method), method.config) for method in methods.values())
    most = counted.most_common(1)[0][0]
    return next(method for method in methods.values() if (type(method), method.config) == most)


def method_name(method: Method[Any]) -> str:
    """The name of a method in a recipe: that of its file."""
    return type(method).__module__.rpartition(".")[2]
