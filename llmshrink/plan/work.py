"""A plan with the objects that carry it out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.formats.base import Format, Slot
from llmshrink.forms import Event
from llmshrink.methods.base import Method
from llmshrink.model.anatomy import Block, Group, Matrix
from llmshrink.model.streamed import BATCH_TOKENS, StreamedModel
from llmshrink.plan.economy import Economy
from llmshrink.statistics import NoStatistic, Statistic


@dataclass
class Work:
    """A plan with the objects that carry it out."""

    model: StreamedModel
    format: Format
    methods: dict[Matrix, Method[Any]]
    slots: dict[Matrix, Slot]
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
        """Whether any method looks at calibration text."""
        return any(method.needs.bytes(1) > 0 for method in self.methods.values())

    def needs(self, group: Group) -> type[Statistic]:
        """The statistic that serves all methods of a group: they differ only where a recipe overrides layers."""
        kinds = [self.methods[m].needs for m in group.matrices if m in self.methods]
        return max(kinds, key=lambda kind: kind.bytes(group.width), default=NoStatistic)

    def meta_tensors(self, block: Block) -> dict[str, Tensor]:
        """All tensors of a block's file, without data."""
        tensors: dict[str, Tensor] = {}
        compressed = {m.key: m for m in block.matrices if m in self.methods}
        for key in block.keys:
            if key in compressed:
                matrix = compressed[key]
                tensors |= self.format.pack(self.slots[matrix], self.methods[matrix].form(matrix.shape, matrix.dtype))
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
