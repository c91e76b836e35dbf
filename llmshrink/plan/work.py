"""A plan with the objects that carry it out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.formats.base import Format, Slot
from llmshrink.forms import Dense, Event, Layer, Quantized, filled, low_rank
from llmshrink.gguf.blueprint import Blueprint
from llmshrink.gguf.checkpoint import SINGLE
from llmshrink.methods.base import Method
from llmshrink.methods.basis import Sharing
from llmshrink.methods.inputs import Inputs
from llmshrink.model.anatomy import Group, Matrix, Part
from llmshrink.model.streamed import BATCH_TOKENS, StreamedModel
from llmshrink.model.surgery import Original
from llmshrink.plan.economy import Economy
from llmshrink.plan.transform import Transforms
from llmshrink.recipe.reconstruct import ReconstructSpec
from llmshrink.recipe.tune import TuneSpec
from llmshrink.statistics import Cross, Fisher, Hessian, NoStatistic, Range, Statistic


@dataclass(frozen=True)
class Repair:
    """What is fitted to make up for what was cut out.

    Attributes:
        matrices: Of the smaller model, those that are fitted.
        rows: Of those of which outputs are gone, the outputs of the original's linear that are left.
        biases: Keys of the biases that are fitted with them.
        damp: How strongly weights are held to what they were; None: found out.
    """

    matrices: frozenset[Matrix]
    rows: Mapping[Matrix, Tensor]
    biases: Mapping[Matrix, str]
    damp: float | None


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
    shards: dict[int, str] = field(default_factory=dict)  # of a part's index -> the file that it is written to
    shard_bytes: dict[str, int] = field(default_factory=dict)
    pack: bool = False  # codes are entropy-coded when all is written: until then they, and the plan's bytes, are plain
    mix: str | None = None  # of the block types in a GGUF file
    transforms: Transforms | None = None  # what is done to weights before; None: nothing
    reconstruct: ReconstructSpec | None = None  # None: codes stay as the methods choose them
    tune: TuneSpec | None = None  # None: scales and norms stay as they are after that
    original: Original | None = None  # that the model was cut out of; None: it is as it was
    repair: Repair | None = None  # of what the surgery left; None: it stays
    blueprint: Blueprint | None = None  # of the one GGUF file that the shards become; None: they are the output
    stored_before: Mapping[str, int] = field(default_factory=dict)  # bytes on disk of what the model was trained from
    events: list[Event] = field(default_factory=list)
    economy: Economy = field(default_factory=lambda: Economy(BATCH_TOKENS))  # of the compress step
    scoring: Economy = field(default_factory=lambda: Economy(BATCH_TOKENS))  # of the comparison of both models

    @property
    def apart(self) -> bool:
        """Whether the shards are no part of the output: they become one file, or are written again."""
        return self.blueprint is not None or self.tune is not None or self.pack

    @property
    def file_bytes(self) -> dict[str, int]:
        """Every file of the output that holds tensors, with its size."""
        return self.shard_bytes if self.blueprint is None else {SINGLE: self.blueprint.size}

    @cached_property
    def tensor_bytes(self) -> dict[str, int]:
        """Every tensor of the output, by its name in the checkpoint, with the bytes of its data."""
        tensors = {name: t.nbytes for part in self.parts for name, t in self.meta_tensors(part).items()}
        if self.blueprint is None:
            return tensors
        computed = {name: t.nbytes for name, t in self.blueprint.computed.items()}
        return {**computed, **{part.key: part.entry.bytes for part in self.blueprint.parts}}

    @property
    def opened_bytes(self) -> int:
        """What is held of the result's ends once any row of them is read: codes that are packed have no rows."""
        ends = (self.model.anatomy.embedding, self.model.anatomy.head)
        found = [m for m in ends if self.pack and m is not None and m in self.methods]
        return sum(t.nbytes for matrix in found for t in self.packed(matrix).values())

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All parts in the order they are done: what the first block's inputs depend on first, all other tensors last.

        An embedding that is left as it is stands among these.
        """
        anatomy = self.model.anatomy
        embedding, head = (m if m in self.methods else None for m in (anatomy.embedding, anatomy.head))
        first = [] if embedding is None else [Part(-1, (embedding.key,), (_alone(embedding),))]
        elsewhere = () if embedding is None else (embedding.key, *anatomy.copies)
        keys = [key for key in (*anatomy.others, *anatomy.unused) if key not in elsewhere]
        last = Part(len(anatomy.blocks), tuple(keys), () if head is None else (_alone(head),))
        return (*first, *anatomy.blocks, last)

    @property
    def needs_data(self) -> bool:
        """Whether any method, any static scale, a transform or a reconstruction looks at calibration text."""
        gathered = any(self.statistic_bytes(group) for part in self.parts for group in part.groups)
        scaled = self.transforms is not None and bool(self.transforms.scalings)
        return gathered or scaled or any(x is not None for x in (self.reconstruct, self.tune, self.repair))

    @cached_property
    def stacks(self) -> tuple[tuple[Matrix, ...], ...]:
        """Matrices that share a tensor, together; the first stores it."""
        found: dict[str, list[Matrix]] = {}
        for matrix, method in self.methods.items():
            place = method.place if isinstance(method, Sharing) else None
            if place is not None:
                found.setdefault(place.home, []).append(matrix)
        return tuple(map(tuple, found.values()))

    def lenders(self, part: Part) -> set[int]:
        """The indices of other parts in whose files tensors lie that matrices of this one need."""
        shared = {layer.shared for m in part.matrices if m in self.methods and (layer := low_rank(self.form(m).weight))}
        homes = {m.name: other.index for other in self.parts for m in other.matrices}
        return {homes[name] for name in shared if name is not None} - {part.index}

    @cached_property
    def vectors(self) -> list[str]:
        """The keys of what is tuned of the tensors that are written dense: norms and biases."""
        return self.model.vectors(key for part in self.parts for key in part.keys)

    @cached_property
    def scale_shapes(self) -> dict[Matrix, tuple[int, ...]]:
        """The matrices in the blocks whose scales can be tuned, with the shape of these; a fused parameter as a whole.

        What is stored must say them: integer codes on an even grid, under one table of scales.
        """
        if self.format.name in ("dense", "gguf"):
            return {}
        found: dict[Matrix, tuple[int, ...]] = {}
        for matrix in (m for block in self.model.anatomy.blocks for m in block.matrices if m in self.methods):
            form = self.form(matrix).weight
            if (
                isinstance(form, Quantized)
                and form.learnable
                and form.minimum is None
                and isinstance(form.scale, Dense)
            ):
                found[matrix] = tuple(form.scale.weight.shape)
        return {matrix: found[matrix] for matrix in self.model.complete(found)}

    @property
    def tuned_numbers(self) -> int:
        """How many numbers a tuning learns."""
        infos = self.model.weights.infos
        scales = sum(math.prod(shape) for shape in self.scale_shapes.values())
        return scales + sum(infos[key].numel for key in self.vectors)

    def reads_data(self, matrix: Matrix) -> bool:
        """Whether a matrix is compressed by what its inputs are on calibration text."""
        return matrix in self.methods and self.methods[matrix].statistic.bytes(1) > 0

    @cached_property
    def needs_slopes(self) -> bool:
        """Whether the inputs of any linear are weighed by gradients."""
        return any(Fisher in self.needs(group) for part in self.parts for group in part.groups)

    @property
    def needs_originals(self) -> bool:
        """Whether the original's states are kept beside the compressed model's."""
        kinds = {kind for part in self.parts for group in part.groups for kind in self.needs(group)}
        learns = any(x is not None for x in (self.reconstruct, self.tune, self.repair))
        return learns or Cross in kinds

    def bytes_before(self, key: str) -> int:
        """Bytes on disk of what became a tensor."""
        if key in self.stored_before:
            return self.stored_before[key]
        return self.model.weights.stored_bytes(key) if self.original is None else self.original.stored_bytes(key)

    @property
    def fitted(self) -> frozenset[str]:
        """Keys of the vectors that a repair changes."""
        return frozenset() if self.repair is None else frozenset(self.repair.biases.values())

    def kind(self, group: Group, method: Method[Any]) -> type[Statistic]:
        """What a method is given of a group.

        An expert of the original may get other tokens than that of the compressed model: they cannot be put in pairs,
        nor weighed by gradients of the original's. What is no linear of a block is not weighed either.
        """
        experts = group.sites[0].expert is not None
        outside = any(matrix.kind in ("embedding", "head") for matrix in group.matrices)
        plain = (experts and method.statistic is Cross) or ((experts or outside) and method.statistic is Fisher)
        return Hessian if plain else method.statistic

    def needs(self, group: Group) -> tuple[type[Statistic], ...]:
        """What is gathered of a group: tokens always, what its methods ask for, and the range of static inputs."""
        methods = [self.kind(group, self.methods[m]) for m in group.matrices if m in self.methods]
        static = any(self.inputs[m].observer for m in group.matrices if m in self.inputs)
        return tuple(dict.fromkeys((NoStatistic, *methods, *([Range] if static else []))))

    def statistic_bytes(self, group: Group) -> int:
        """Bytes of all that is gathered of a group."""
        return sum(kind.bytes(group.width) for kind in self.needs(group))

    def form(self, matrix: Matrix) -> Layer:
        """What becomes of a compressed matrix, without data."""
        method, inputs = self.methods[matrix], self.inputs.get(matrix)
        layer = self.storable(method.form(matrix.shape, matrix.dtype))
        return layer if inputs is None else replace(layer, input=inputs.meta(method.scales or matrix.dtype))

    def storable(self, layer: Layer) -> Layer:
        """A result as the format takes it: with zeros where weights were dropped, if it stores these."""
        return layer if self.format.holds_sparse else replace(layer, weight=filled(layer.weight))

    def packed(self, matrix: Matrix) -> dict[str, Tensor]:
        """All tensors that store a matrix, without data; itself where it is left as it is."""
        if matrix not in self.methods:
            return {matrix.key: _empty(self.model, matrix.key)}
        return self.format.pack(self.slots[matrix], self.form(matrix))

    def meta_tensors(self, part: Part) -> dict[str, Tensor]:
        """All tensors of a part's file, without data."""
        tensors: dict[str, Tensor] = {}
        matrices = {m.key: m for m in part.matrices}
        for key in part.keys:
            tensors |= self.packed(matrices[key]) if key in matrices else {key: _empty(self.model, key)}
        return tensors


def _alone(matrix: Matrix) -> Group:
    return Group((matrix.site,), (matrix,))


def _empty(model: StreamedModel, key: str) -> Tensor:
    info = model.weights.infos[key]
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def main_method(methods: dict[Matrix, Method[Any]]) -> Method[Any]:
    """The method, with its settings, that most matrices get."""
    counted = Counter((type(method), method.config) for method in methods.values())
    most = counted.most_common(1)[0][0]
    return next(method for method in methods.values() if (type(method), method.config) == most)
