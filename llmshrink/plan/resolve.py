"""From a recipe and a model to the work: a method and a place on disk for every matrix, or all that cannot be done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from llmshrink.errors import PlanError
from llmshrink.formats import format_names, load_format
from llmshrink.formats.base import Format, Slot
from llmshrink.formats.runtimes import Stored, entry
from llmshrink.forms import Event, Scheme
from llmshrink.io import safetensors
from llmshrink.methods import load_method
from llmshrink.methods.base import Method
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.loading import layers, stored
from llmshrink.plan.work import Work, main_method, method_name
from llmshrink.recipe.schema import MethodSpec, QuantizeStage, Recipe

GROUP_SIZES = (128, 64, 32)  # what runtimes have kernels for, largest first
DEFAULT_LENGTH = 2048


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
    default = _default_method(stage, model, matrices, events)
    try:
        specs = {m: stage.method_for(m.name, default) for m in matrices}
    except ValidationError as error:
        raise PlanError(f"The keys in `layers` do not fit {default.name}: {error.errors()[0]['msg']}") from error
    _check_patterns(stage, matrices)
    usual = _usual_group(stage, default, matrices, events)
    methods, left, problems = {}, {}, []
    for matrix, spec in specs.items():
        if spec is None:
            left[matrix] = "the recipe leaves it out"
            continue
        method, reason = _fit(spec, stage, matrix, usual, events)
        if method is None:
            left[matrix] = reason or ""
        elif why := method.check(matrix.shape):
            problems.append(f"{matrix.name} {list(matrix.shape)}: {why}")
        else:
            methods[matrix] = method
    _refuse(problems, "set on_indivisible to smaller_group, skip or channel, or choose another group_size")
    if not methods:
        raise PlanError("The recipe leaves out every layer; nothing would be compressed.")
    chosen = _choose_format(stage, methods)
    methods = {m: type(method)(method.config, chosen.scale_dtype(m.dtype)) for m, method in methods.items()}
    work = Work(
        model,
        chosen,
        methods,
        {m: Slot(m.key, m.module, m.shape, m.dtype, m.kind) for m in matrices},
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
    if unused := model.anatomy.unused:
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        message = f"{len(unused)} tensors on disk belong to no parameter of the model; copied as they are: {shown}"
        work.events.append(Event("unused_tensors", message))
    work.quantization_config = work.format.config(list(layers(work)), sorted(_left_modules(work)), matrices[0].dtype)
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


def row_length(asked: int | None, model: StreamedModel, events: list[Event]) -> int:
    """Tokens in a row: as asked, but never more than the model has positions for."""
    positions = model.positions or DEFAULT_LENGTH
    if asked is not None and asked > positions:
        message = f"rows of {asked} tokens cut to the model's {positions} positions"
        if not any(event.kind == "length_cut" and event.message == message for event in events):
            events.append(Event("length_cut", message))
    return min(asked or DEFAULT_LENGTH, positions)


def _default_method(
    stage: QuantizeStage, model: StreamedModel, matrices: list[Matrix], events: list[Event]
) -> MethodSpec:
    """gptq, or nf4 where transformers does not read what gptq is usually written as."""
    typed = stage.method or MethodSpec.model_validate({})
    if typed.name is not None:
        return typed
    settings = typed.settings
    kinds = frozenset(m.kind for m in matrices)
    usual = entry(Stored("compressed-tensors", kinds, model_type=model.source.config.model_type), "transformers")
    plain = stage.format is None and settings.get("bits", 4) == 4 and not settings.keys() - {"bits"}
    if plain and usual.support == "no":
        events.append(Event("default_method", f"nf4 in place of gptq, as compressed-tensors: {usual.reason}"))
        return MethodSpec.model_validate({"name": "nf4"})
    return MethodSpec.model_validate({"name": "gptq", **settings})


def _usual_group(stage: QuantizeStage, default: MethodSpec, matrices: list[Matrix], events: list[Event]) -> int:
    """The group size that nobody typed: 128, or one for all layers where transformers reads only one scheme."""
    name = stage.format.name if stage.format else "compressed-tensors"
    two = frozenset(Scheme(4, default.settings.get("symmetric", True), size) for size in GROUP_SIZES[:2])
    if entry(Stored(name, frozenset(m.kind for m in matrices), two), "transformers").support != "no":
        return GROUP_SIZES[0]
    widths = {m.shape[1] for m in matrices}  # one group as wide as a layer is another scheme: one scale per channel
    size = next((g for g in GROUP_SIZES if all(w % g == 0 for w in widths) and g not in widths), -1)
    if size != GROUP_SIZES[0] and default.settings.get("group_size") is None and default.name not in ("nf4", "fp4"):
        what = f"groups of {size}" if size > 0 else "one scale per channel"
        events.append(Event("group_size", f"{what} for all layers: transformers reads one scheme for this model"))
    return size


def _fit(
    spec: MethodSpec, stage: QuantizeStage, matrix: Matrix, usual: int, events: list[Event]
) -> tuple[Method[Any] | None, str | None]:
    """The method with a group size that fits the matrix, or None and why it is left out."""
    cls = load_method(spec.name or "gptq")
    config = cls.Config(**spec.settings)
    if "group_size" not in cls.Config.model_fields:
        return cls(config), None
    width, asked = matrix.shape[1], getattr(config, "group_size")  # noqa: B009 - not every Config has it
    size = usual if asked is None else asked
    if size != -1 and width % size:
        policy = stage.indivisible
        if policy == "skip":
            reason = f"group size {size} does not divide its width {width}"
            events.append(Event("skipped", f"left as it is: {reason}", matrix.name))
            return None, reason
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


def _check_format(work: Work) -> None:
    """Refuse what the format cannot hold, and what transformers would not read back."""
    name, given = work.format.name, list(layers(work))
    problems = [f"{slot.name}: {why}" for slot, layer in given if (why := work.format.check(slot, layer))]
    if why := work.format.check_all(given, _left_modules(work)):
        problems.append(f"the layers together: {why}")
    if not problems and (found := entry(stored(work), "transformers")).support == "no":
        problems.append(f"transformers would not load it: {found.reason}")
    _refuse(
        [f"format {name}: {p}" for p in problems],
        "choose another --format or --method, or leave the layers out with `ignore`",
    )


def _left_modules(work: Work) -> set[str]:
    """Modules that loaders would take for compressed, if they were not told."""
    treated = {m.module for m in work.methods}
    origins = work.model.map.origins
    linears = {name for name, module in work.model.model.named_modules() if isinstance(module, nn.Linear)}
    left = (linears | {m.module for m in work.left}) - treated
    # Another class may be loaded from the same files, one that uses what this one does not: a pooler, a second head.
    unused = {key for key in work.model.anatomy.unused if len(work.model.weights.infos[key].shape) == 2}
    names = {key.removesuffix(".weight") for key in unused if key.endswith(".weight")}
    left |= names | {name.removeprefix(f"{work.model.model.base_model_prefix}.") for name in names}
    # Loaders match names in memory or on disk: the head of GPT-NeoX has another one there, routers too.
    on_disk = {key for name in left if (found := origins.get(f"{name}.weight")) for key in found.keys}
    on_disk |= {key for block in work.model.anatomy.blocks for key, _ in block.left}
    return left | {key.removesuffix(".weight") for key in on_disk}


def _lay_out_files(work: Work) -> None:
    """One file for each block and one for the rest: a resumed run keeps every finished file."""
    blocks = work.model.anatomy.blocks
    total = len(blocks) + 1
    for block in blocks:
        work.shards[block.index] = f"model-{block.index + 1:05d}-of-{total:05d}.safetensors"
        work.file_bytes[work.shards[block.index]] = safetensors.file_size(work.meta_tensors(block))
    work.shards[-1] = f"model-{total:05d}-of-{total:05d}.safetensors"
    work.file_bytes[work.shards[-1]] = safetensors.file_size(work.meta_others())
