"""What would be done to every layer of a model, what it would weigh, and what cannot be done: before any compute.

A plan reads the recipe, config.json and the safetensors headers. Sizes are exact, because formats pack tensors without
data on the `meta` device and the files' headers follow from names and shapes.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from llmshrink.errors import PlanError
from llmshrink.formats import format_names, load_format
from llmshrink.formats.base import Format, Slot
from llmshrink.formats.runtimes import Kind
from llmshrink.forms import Event, Layer
from llmshrink.io import safetensors
from llmshrink.methods import load_method
from llmshrink.methods.base import Method
from llmshrink.model.anatomy import Block, Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.recipe.schema import MethodSpec, QuantizeStage, Recipe

GROUP_SIZES = (128, 64, 32)  # what runtimes have kernels for, largest first
DEFAULT_LENGTH = 2048


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerPlan(_Part):
    """One matrix [out, in]; `method` is None where it is left as it is, and `reason` says why."""

    name: str
    shape: tuple[int, int]
    parameters: int
    method: str | None
    bits: int | None
    group_size: int | None
    bytes_before: int
    bytes_after: int
    reason: str | None


class BlockPlan(_Part):
    """One decoder block."""

    index: int
    layers: list[LayerPlan]


class TensorPlan(_Part):
    """A tensor outside the matrices of the blocks, copied as it is."""

    name: str
    bytes: int
    parameters: int


class PlanEvent(_Part):
    """Something the plan does differently from what the recipe says."""

    kind: str
    message: str
    layer: str | None = None


class Plan(_Part):
    """The whole plan; bytes of tensors before and after, exact."""

    model: str
    architecture: str
    method: str
    format: str
    blocks: list[BlockPlan]
    others: list[TensorPlan]
    parameters: int
    parameters_compressed: int
    bytes_before: int
    bytes_after: int  # of all tensors
    file_bytes: dict[str, int]  # every safetensors file of the output, with its header
    bits_per_weight: float  # of the whole file over all parameters
    memory_bytes: int  # peak anonymous memory of the compress step above the level after the imports
    evaluation_bytes: int  # the same of the comparison of both models; 0: none is asked for
    disk_bytes: int  # output, and what a resume needs beside it
    disk_free: int
    output: str
    events: list[PlanEvent]


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

    @property
    def needs_data(self) -> bool:
        """Whether any method looks at calibration text."""
        return any(method.needs.bytes(1) > 0 for method in self.methods.values())

    def kinds(self) -> set[Kind]:
        """The kinds of layers that are compressed."""
        return {_kind(matrix) for matrix in self.methods}

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


def resolve(recipe: Recipe, stage: QuantizeStage, model: StreamedModel) -> Work:
    """Decide what happens to every matrix.

    Raises:
        PlanError: layers that cannot be done as asked (all are listed), an expression that matches nothing.
    """
    matrices = [m for block in model.anatomy.blocks for m in block.matrices]
    if not matrices:
        raise PlanError(
            f"{type(model.model).__name__}: no linear layers were found in its blocks; nothing to compress."
        )
    if model.weights.compressed or model.weights.format.name != "dense":
        raise PlanError(
            f"{model.source.id} is quantized already ({model.weights.format.name}); give the original model."
        )
    events: list[Event] = []
    default = _default_method(stage, matrices, events)
    try:
        specs = {m: stage.method_for(m.name, default) for m in matrices}
    except ValidationError as error:
        raise PlanError(f"The keys in `layers` do not fit {default.name}: {error.errors()[0]['msg']}") from error
    _check_patterns(stage, matrices)
    methods, left, problems = {}, {}, []
    for matrix, spec in specs.items():
        if spec is None:
            left[matrix] = "the recipe leaves it out"
            continue
        method, reason = _fit(spec, stage, matrix, events)
        if method is None:
            left[matrix] = reason or ""
        elif why := method.check(matrix.shape):
            problems.append(f"{matrix.name} {list(matrix.shape)}: {why}")
        else:
            methods[matrix] = method
    _refuse(problems, "set on_indivisible to smaller_group, skip or channel, or choose another group_size")
    if not methods:
        raise PlanError("The recipe leaves out every layer; nothing would be compressed.")
    work = Work(
        model,
        _choose_format(stage, methods),
        methods,
        {m: _slot(m) for m in matrices},
        left,
        None,
        0,
        _output(recipe, model.source.id, main_method(methods)),
        events=_merged(events),
    )
    _check_format(work)
    for block in model.anatomy.blocks:
        for key, why in block.left:
            work.events.append(Event("left_dense", f"left as it is: {why}", key))
    work.quantization_config = work.format.config(list(_layers(work)), sorted(_left_modules(work)), matrices[0].dtype)
    work.length = row_length(recipe.calibration.length, model, work.events)
    _lay_out_files(work)
    return work


def _output(recipe: Recipe, model_id: str, method: Method[Any]) -> Path:
    """The folder of the result: as the recipe says, else out/<model>-<method>[-w<bits>]."""
    if recipe.output is not None:
        return Path(recipe.output).expanduser()
    name, bits = method_name(method), getattr(method.config, "bits", None)
    label = re.sub(r"[^\w.\-]+", "-", Path(model_id).name)
    return Path("out") / f"{label}-{name}{'' if bits is None or name in ('nf4', 'fp4') else f'-w{bits}'}"


def main_method(methods: dict[Matrix, Method[Any]]) -> Method[Any]:
    """The method, with its settings, that most matrices get."""
    counted = Counter((type(method), method.config) for method in methods.values())
    cls, config = counted.most_common(1)[0][0]
    return cls(config)


def method_name(method: Method[Any]) -> str:
    """The name of a method in a recipe: that of its file."""
    return type(method).__module__.rpartition(".")[2]


def row_length(asked: int | None, model: StreamedModel, events: list[Event]) -> int:
    """Tokens in a row: as asked, but never more than the model has positions for."""
    positions = (
        getattr(model.source.config.get_text_config(decoder=True), "max_position_embeddings", None) or DEFAULT_LENGTH
    )
    if asked is not None and asked > positions:
        message = f"rows of {asked} tokens cut to the model's {positions} positions"
        if not any(event.kind == "length_cut" and event.message == message for event in events):
            events.append(Event("length_cut", message))
    return min(asked or DEFAULT_LENGTH, positions)


def _default_method(stage: QuantizeStage, matrices: list[Matrix], events: list[Event]) -> MethodSpec:
    """gptq, unless the model's layers are Conv1D, which only bnb files bring back."""
    typed = stage.method or MethodSpec.model_validate({})
    if typed.name is not None:
        return typed
    settings = typed.settings
    conv1d = any(m.transposed for m in matrices)
    if conv1d and stage.format is None and settings.get("bits", 4) == 4 and not settings.keys() - {"bits"}:
        events.append(
            Event(
                "default_method", "nf4 in place of gptq: no loader reads compressed-tensors into Conv1D layers (GPT-2)"
            )
        )
        return MethodSpec.model_validate({"name": "nf4"})
    return MethodSpec.model_validate({"name": "gptq", **settings})


def _fit(
    spec: MethodSpec, stage: QuantizeStage, matrix: Matrix, events: list[Event]
) -> tuple[Method[Any] | None, str | None]:
    """The method with a group size that fits the matrix, or None and why it is left out."""
    cls = load_method(spec.name or "gptq")
    config = cls.Config(**spec.settings)
    if "group_size" not in cls.Config.model_fields:
        return cls(config), None
    width, asked = matrix.shape[1], getattr(config, "group_size")  # noqa: B009 - not every Config has it
    size = GROUP_SIZES[0] if asked is None else asked
    if size != -1 and width % size:
        policy = stage.indivisible
        if policy == "skip":
            return None, f"group size {size} does not divide its width {width}"
        if policy in ("smaller_group", "channel"):
            smaller = [g for g in GROUP_SIZES if g < size and width % g == 0] if policy == "smaller_group" else []
            chosen = smaller[0] if smaller else -1
            what = f"groups of {chosen}" if smaller else "one scale per channel"
            events.append(Event("group_size", f"{what} in place of {size}, which does not divide {width}", matrix.name))
            size = chosen
    return cls(config.model_copy(update={"group_size": size})), None


def _merged(events: list[Event]) -> list[Event]:
    """Events of many layers with one message become one that counts them."""
    found: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        found.setdefault((event.kind, event.message), []).append(event)
    merged = []
    for (kind, message), same in found.items():
        names = [e.layer for e in same if e.layer]
        some = f" ({len(names)} layers: {names[0]}{', ...' if len(names) > 1 else ''})" if names else ""
        merged.append(Event(kind, message + some, names[0] if len(names) == 1 else None))
    return merged


def _check_patterns(stage: QuantizeStage, matrices: list[Matrix]) -> None:
    for pattern in (*stage.layers, *stage.ignore):
        if not any(re.fullmatch(pattern, m.name) for m in matrices):
            some = ", ".join(m.name for m in matrices[:3])
            raise PlanError(f"The expression {pattern!r} matches no layer.", hint=f"Layers are named like: {some}")


def _refuse(problems: list[str], hint: str) -> None:
    if problems:
        shown = problems[:10] + ([f"... and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise PlanError("\n".join(["These layers cannot be done as asked:", *(f"  - {p}" for p in shown)]), hint=hint)


def _choose_format(stage: QuantizeStage, methods: dict[Matrix, Method[Any]]) -> Format:
    if stage.format is not None:
        if stage.format.name not in format_names():
            raise PlanError(f"There is no format {stage.format.name!r}; known: {', '.join(format_names())}.")
        return load_format(stage.format.name)
    matrix, method = next(iter(methods.items()))
    levels = getattr(method.form(matrix.shape, matrix.dtype).weight, "levels", None)
    return load_format("compressed-tensors" if levels is None else "bnb")


def _layers(work: Work) -> Iterator[tuple[Slot, Layer]]:
    for matrix, method in work.methods.items():
        yield work.slots[matrix], method.form(matrix.shape, matrix.dtype)


def _check_format(work: Work) -> None:
    problems = [f"{slot.name}: {why}" for slot, layer in _layers(work) if (why := work.format.check(slot, layer))]
    if why := work.format.check_all(_layers(work)):
        problems.append(f"the layers together: {why}")
    _refuse(
        [f"format {work.format.name}: {p}" for p in problems],
        "choose another --format or --method, or leave the layers out with `ignore`",
    )


def _slot(matrix: Matrix) -> Slot:
    expert = matrix.site.expert is not None
    return Slot(matrix.key, matrix.module, matrix.shape, matrix.dtype, matrix.transposed, expert)


def _kind(matrix: Matrix) -> Kind:
    if matrix.site.expert is not None:
        return "experts"
    return "conv1d" if matrix.transposed else "linear"


def _left_modules(work: Work) -> set[str]:
    """Modules that loaders would take for compressed, if they were not told."""
    treated = {m.module for m in work.methods}
    linears = {name for name, module in work.model.model.named_modules() if isinstance(module, nn.Linear)}
    routers = {key.removesuffix(".weight") for block in work.model.anatomy.blocks for key, _ in block.left}
    return ((linears | {m.module for m in work.left}) - treated) | routers


def _lay_out_files(work: Work) -> None:
    """One file for each block and one for the rest: a resumed run keeps every finished file."""
    blocks = work.model.anatomy.blocks
    total = len(blocks) + 1
    for block in blocks:
        work.shards[block.index] = f"model-{block.index + 1:05d}-of-{total:05d}.safetensors"
        work.file_bytes[work.shards[block.index]] = safetensors.file_size(work.meta_tensors(block))
    work.shards[-1] = f"model-{total:05d}-of-{total:05d}.safetensors"
    work.file_bytes[work.shards[-1]] = safetensors.file_size(work.meta_others())


def describe(work: Work, recipe: Recipe, memory_bytes: int, evaluation_bytes: int) -> Plan:
    """The plan as data."""
    model, infos = work.model, work.model.weights.infos
    blocks, compressed = [], 0
    after = sum(t.numel() * t.itemsize for t in work.meta_others().values())
    for block in model.anatomy.blocks:
        tensors = work.meta_tensors(block)
        after += sum(t.numel() * t.itemsize for t in tensors.values())
        layers = []
        for matrix in block.matrices:
            before = infos[matrix.key].bytes
            method = work.methods.get(matrix)
            if method is None:
                layers.append(_left_plan(matrix, before, work.left[matrix]))
                continue
            layer = method.form(matrix.shape, matrix.dtype)
            packed = work.format.pack(work.slots[matrix], layer)
            compressed += matrix.numel
            layers.append(
                LayerPlan(
                    name=matrix.name,
                    shape=matrix.shape,
                    parameters=matrix.numel,
                    method=method_name(method),
                    bits=getattr(layer.weight, "bits", None),
                    group_size=getattr(method.config, "group_size", getattr(method.config, "block_size", None)),
                    bytes_before=before,
                    bytes_after=sum(t.numel() * t.itemsize for t in packed.values()),
                    reason=None,
                )
            )
        blocks.append(BlockPlan(index=block.index, layers=layers))
    inside = {m.key for b in model.anatomy.blocks for m in b.matrices}
    others = [
        TensorPlan(name=k, bytes=i.bytes, parameters=i.numel) for k, i in sorted(infos.items()) if k not in inside
    ]
    parameters = sum(info.numel for info in infos.values())
    hidden = recipe.calibration.samples * work.length * model.hidden * 4
    first = main_method(work.methods)
    return Plan(
        model=model.source.id,
        architecture=type(model.model).__name__,
        method=method_name(first),
        format=work.format.name,
        blocks=blocks,
        others=others,
        parameters=parameters,
        parameters_compressed=compressed,
        bytes_before=model.dense_bytes,
        bytes_after=after,
        file_bytes=work.file_bytes,
        bits_per_weight=8 * after / parameters,
        memory_bytes=memory_bytes,
        evaluation_bytes=evaluation_bytes,
        disk_bytes=sum(work.file_bytes.values()) + (2 * hidden if work.needs_data else 0) - _already(work.output),
        disk_free=shutil.disk_usage(_existing(work.output)).free,
        output=str(work.output),
        events=[PlanEvent(kind=e.kind, message=e.message, layer=e.layer) for e in work.events],
    )


def _left_plan(matrix: Matrix, size: int, reason: str) -> LayerPlan:
    return LayerPlan(
        name=matrix.name,
        shape=matrix.shape,
        parameters=matrix.numel,
        method=None,
        bits=None,
        group_size=None,
        bytes_before=size,
        bytes_after=size,
        reason=reason,
    )


def _already(output: Path) -> int:
    """Bytes that an unfinished run of this output holds already: they are not needed again."""
    partial = output.with_name(output.name + ".partial")
    return sum(p.stat().st_size for p in partial.rglob("*") if p.is_file()) if partial.is_dir() else 0


def _existing(path: Path) -> Path:
    """The nearest parent that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
