"""What becomes of a group of linears: its matrices through their method and their format, with their reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from llmshrink.engine.lanes import side_by_side
from llmshrink.formats.base import Format, Slot
from llmshrink.forms import (
    Codebook,
    Event,
    Form,
    Layer,
    Quantized,
    coded,
    decode,
    join_rows,
    low_rank,
    quantized,
    relative_error,
    relative_error_of,
    shape_of,
    split_rows,
)
from llmshrink.memory import memory_error, release, trim
from llmshrink.methods import by_weights
from llmshrink.methods.base import Method, Prepared, method_name
from llmshrink.methods.sparsity import PRUNED
from llmshrink.model.anatomy import Group, Matrix
from llmshrink.model.streamed import HEAD_ROWS, Decoded
from llmshrink.plan.work import Work
from llmshrink.report.schema import LayerReport
from llmshrink.statistics import Gathered, NoStatistic, Range

STACK = 1 << 22  # weights compressed in one call, where rows do not depend on each other
STAY = 0.99  # of the zeros of a pruned matrix, or it is told
LOST = "zeros_lost"
SMALL = 1024  # width of a group, and the side of the square its matrices fill, up to which two are done at a time


@dataclass
class Made:
    """What became of a group, or of all groups of a block."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # to write
    decoded: dict[str, Decoded] = field(default_factory=dict)  # by key: what they mean
    layers: list[LayerReport] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    forms: dict[Matrix, Form] = field(default_factory=dict)  # what the methods chose, where it is learned further

    def add(self, other: Made) -> None:
        """Take over what became of another group."""
        self.tensors |= other.tensors
        self.decoded |= other.decoded
        self.layers += other.layers
        self.events += other.events
        self.forms |= other.forms

    def copy(self) -> Made:
        """The same, to try something else with what is compressed."""
        return replace(self, tensors=dict(self.tensors), decoded=dict(self.decoded), layers=list(self.layers))


class GroupCompressor:
    """Compresses groups with the methods of a plan, and goes on with what their files mean."""

    def __init__(self, work: Work) -> None:
        self._work, self._model = work, work.model

    def compress(self, groups: list[Group], statistics: dict[Group, Gathered]) -> Iterator[Made]:
        """What becomes of each group; those with little to compute go side by side, the others one by one."""
        for small, members in groupby(groups, key=is_small):
            todo = list(members)

            def job(number: int, todo: list[Group] = todo) -> Made:
                return self._group_or_on_cpu(todo[number], statistics.pop(todo[number]))

            yield from side_by_side(self._model.device, job, len(todo)) if small else map(job, range(len(todo)))

    def _group_or_on_cpu(self, group: Group, gathered: Gathered) -> Made:
        """What becomes of a group; where memory runs out, tried once more, on the CPU."""
        try:
            return self._group(group, gathered, self._model.device)
        except (MemoryError, RuntimeError) as error:
            if not memory_error(error):
                raise
        release(self._model.device)
        cpu = torch.device("cpu")
        for statistic in gathered.values():
            statistic.to(cpu)
        made = self._group(group, gathered, cpu)
        how = "tried again" if self._model.device == cpu else "done on the CPU"
        message = f"memory ran out while {group.matrices[0].name} was compressed: {how}"
        made.events.append(Event("out_of_memory", message))
        return made

    def _group(self, group: Group, gathered: Gathered, device: torch.device) -> Made:
        made = Made()
        prepared: dict[tuple[type[Method[Any]], Any], Prepared] = {}
        for method, matrices in self._stacks(group):
            start = time.perf_counter()
            used, event = self._or_baseline(method, matrices[0], gathered[NoStatistic].tokens)
            key = (type(used), used.config)
            if key not in prepared:
                prepared[key] = used.prepare(gathered[self._work.kind(group, used)])
                trim()
            weights = [self._model.read(matrix).to(device) for matrix in matrices]
            layer = compressed(used, torch.cat(weights) if len(weights) > 1 else weights[0], prepared[key])
            layer = self._work.storable(layer)
            parts = split_rows(layer, [len(w) for w in weights]) if len(weights) > 1 else [layer]
            found = [*([event] if event else []), *prepared[key].events, *layer.events]
            fallback = any(e.kind.endswith("_fallback") for e in found)
            for matrix, weight, whole in zip(matrices, weights, parts, strict=True):
                part, told = self._with_input(matrix, whole, gathered)
                made.events += [Event(e.kind, e.message, matrix.name, e.data) for e in (*found, *told)]
                packed, error, zeros = self._store(made, matrix, part, weight)
                made.events += self._lost(made, matrix, weight)
                if self._work.reconstruct is not None and used.learnable:
                    made.forms[matrix] = part.weight
                seconds = (time.perf_counter() - start) / len(matrices)
                before = self._work.bytes_before(matrix.key)
                report = _report(matrix, used, part, packed, before, error, zeros, fallback, self._work.format, seconds)
                made.layers.append(report)
        return made

    def _store(self, made: Made, matrix: Matrix, layer: Layer, weight: Tensor) -> tuple[dict[str, Tensor], float, int]:
        """What is written of a matrix, its distance to the `weight` that it stands for, and how much of it is zero."""
        slot = self._work.slots[matrix]
        packed = self._work.format.pack(slot, layer)
        # Go on with what the file means, not with what the method meant.
        known = {**packed, **self._work.format.borrowed(slot, layer)}
        made.decoded[matrix.key] = self.decoded(slot, known.__getitem__)
        made.tensors |= packed
        if matrix.kind in ("embedding", "head"):
            return packed, *self._compared(slot, packed, weight)
        decoded = made.decoded[matrix.key].weight()
        return packed, relative_error(weight, decoded), decoded.numel() - int(decoded.count_nonzero())

    def _compared(self, slot: Slot, packed: dict[str, Tensor], weight: Tensor) -> tuple[float, int]:
        """The distance of a large matrix to the `weight` that it stands for, and its zeros, a stretch at a time."""
        read = self._work.format.reader(slot, packed.__getitem__, self._work.quantization_config)
        zeros = 0

        def stretches() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal zeros
            for start in range(0, len(weight), HEAD_ROWS):
                decoded = read(slice(start, start + HEAD_ROWS))
                zeros += decoded.numel() - int(decoded.count_nonzero())
                yield weight[start : start + HEAD_ROWS], decoded

        return relative_error_of(stretches()), zeros

    def _lost(self, made: Made, matrix: Matrix, weight: Tensor) -> list[Event]:
        """What to tell where pruned weights are there again; `weight` is what the method was given."""
        weights = self._model.weights
        stored = matrix.seen(weights.unchanged(matrix.key)) if matrix.key in weights.edits else weight
        if (pruned := stored.numel() - int(stored.count_nonzero())) < PRUNED * stored.numel():
            return []
        decoded = made.decoded[matrix.key].weight()
        stayed = int(((stored.to(decoded.device) == 0) & (decoded == 0)).sum())
        if stayed >= STAY * pruned:
            return []
        spread = weight.count_nonzero() > stored.numel() - STAY * pruned
        why = "a transform spreads them" if spread else "what is written has none; integers without an offset have"
        message = f"its pruned weights are not all zero any more: {why}"
        return [Event(LOST, message, matrix.name, {"lost": 1 - stayed / pruned})]

    def replace(self, made: Made, matrix: Matrix, form: Form) -> None:
        """Write another form of a matrix that is compressed; nobody minimised the method's own error with it."""
        layer = Layer(form, input=made.decoded[matrix.key].input)
        weight = self._model.read(matrix)
        _, error, zeros = self._store(made, matrix, layer, weight)
        others = [event for event in made.events if (event.kind, event.layer) != (LOST, matrix.name)]
        made.events = others + self._lost(made, matrix, weight)
        number = next(i for i, report in enumerate(made.layers) if report.name == matrix.name)
        changes = {"relative_error": error, "zeros": zeros, "objective": None, "reconstructed": True}
        made.layers[number] = made.layers[number].model_copy(update=changes)

    def _stacks(self, group: Group) -> list[tuple[Method[Any], list[Matrix]]]:
        """The group's matrices, small ones of one method together: a column loop costs the same for all of them."""
        stacks: list[tuple[Method[Any], list[Matrix]]] = []
        for matrix in group.matrices:
            method = self._work.methods.get(matrix)
            if method is None:
                continue
            last, members = stacks[-1] if stacks else (None, [])
            same = last is not None and type(last) is type(method) and last.config == method.config and method.by_row
            if same and members[0].dtype == matrix.dtype and sum(m.numel for m in [*members, matrix]) <= STACK:
                members.append(matrix)
            else:
                stacks.append((method, [matrix]))
        return stacks

    def decoded(self, slot: Slot, get: Callable[[str], Tensor]) -> Decoded:
        """What the stored tensors that `get` returns by name mean."""
        fmt, config = self._work.format, self._work.quantization_config
        return Decoded(lambda: decode(fmt.unpack(slot, get, config)), fmt.unpack_input(slot, get, config))

    def _with_input(self, matrix: Matrix, layer: Layer, gathered: Gathered) -> tuple[Layer, list[Event]]:
        """The layer with the scheme of its inputs, where they are rounded, and what to tell of it."""
        inputs = self._work.inputs.get(matrix)
        if inputs is None:
            return layer, []
        seen = gathered.get(Range)
        assert seen is None or isinstance(seen, Range)
        scheme, event = inputs.scheme(seen, self._work.methods[matrix].scales or matrix.dtype)
        return replace(layer, input=scheme), [event] if event else []

    def _or_baseline(self, method: Method[Any], matrix: Matrix, tokens: int) -> tuple[Method[Any], Event | None]:
        """An expert that saw fewer tokens than it has inputs has a singular Hessian: only its weights count."""
        if method.baseline is None or not starved(matrix, tokens):
            return method, None
        message = f"{method.baseline} from the weights alone: it saw {tokens} calibration tokens"
        return by_weights(method), Event("expert_fallback", message, data={"tokens": float(tokens)})


def starved(matrix: Matrix, tokens: int) -> bool:
    """Whether an expert saw too few tokens for what is known of its inputs to count."""
    return matrix.site.expert is not None and tokens < matrix.shape[1]


def is_small(group: Group) -> bool:
    """Whether a group is compressed beside another."""
    return group.width <= SMALL and sum(m.numel for m in group.matrices) <= SMALL * SMALL


def compressed(method: Method[Any], weight: Tensor, prepared: Prepared) -> Layer:
    """Compress a matrix, a stretch of rows at a time where they do not depend on each other: that bounds the memory."""
    rows = -(-STACK // weight.shape[1]) if method.by_row else len(weight)
    layers = [method.compress(part, prepared) for part in torch.split(weight, rows)]
    return join_rows(layers) if len(layers) > 1 else layers[0]


def _report(
    matrix: Matrix,
    method: Method[Any],
    layer: Layer,
    packed: dict[str, Tensor],
    bytes_before: int,
    error: float,
    zeros: int,
    fallback: bool,
    stored_as: Format,
    seconds: float,
) -> LayerReport:
    form, codes, grid, product = layer.weight, coded(layer.weight), quantized(layer.weight), low_rank(layer.weight)
    size = sum(t.numel() * t.itemsize for t in packed.values())
    return LayerReport(
        name=matrix.name,
        shape=matrix.shape,
        method=method_name(method),
        form=type(form).__name__,
        format=stored_as.name,
        bits=None if codes is None else codes.bits // (codes.dim if isinstance(codes, Codebook) else 1),
        group_size=_group_size(grid, matrix.shape[1]),
        rank=None if product is None else shape_of(product.right)[0],
        shares=None if product is None else product.shared,
        type=stored_as.type_of(layer),
        inputs=None if layer.input is None else layer.input.words,
        parameters=matrix.numel,
        bytes_before=bytes_before,
        bytes_after=size,
        bits_per_weight=8 * size / matrix.numel,
        relative_error=error,
        zeros=zeros,
        objective=None if layer.objective is None else layer.objective.share,
        seconds=seconds,
        fallback=fallback,
    )


def _group_size(form: Quantized | None, width: int) -> int | None:
    if form is None:
        return None
    size = form.block if isinstance(form.block, int) else form.block[1]
    return None if size == width else size
