"""From a method for every matrix to the whole work: its place on disk, its files, and what no loader would take."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

from torch import nn

from llmshrink.errors import PlanError
from llmshrink.formats.base import Format, Slot
from llmshrink.formats.own import OwnFormat
from llmshrink.formats.runtimes import Runtime, entry
from llmshrink.forms import Event
from llmshrink.gguf.blueprint import draw
from llmshrink.io import safetensors
from llmshrink.methods.base import Method, ShareConfig, method_name
from llmshrink.methods.inputs import Inputs
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.loading import layers, stored
from llmshrink.plan.rehearse import rehearse
from llmshrink.plan.work import Work, main_method
from llmshrink.recipe.schema import Recipe

DEFAULT_LENGTH = 2048
PROOF: dict[str, Runtime] = {"gguf": "llama.cpp"}  # the runtime that must load a format; else transformers


def lay_out(
    recipe: Recipe,
    model: StreamedModel,
    fmt: Format,
    methods: dict[Matrix, Method[Any]],
    inputs: dict[Matrix, Inputs],
    left: dict[Matrix, str],
    events: list[Event],
    mix: str | None = None,
    *,
    pack: bool = False,
) -> Work:
    """The work that these methods make, with every file known.

    Args:
        recipe: names the output and the calibration text.
        model: what is compressed.
        fmt: how it is written.
        methods: of every matrix that is compressed.
        inputs: of those whose inputs are to be rounded.
        left: matrices that stay as they are, and why.
        events: what was decided otherwise than asked.
        mix: of the types in a GGUF file; None: it has none that has a name.
        pack: whether codes are entropy-coded in the end.

    Raises:
        PlanError: the format cannot hold a layer, or transformers would not read it back; all such layers are listed.
    """
    matrices = [*(m for block in model.anatomy.blocks for m in block.matrices), *methods]
    work = Work(
        model,
        fmt,
        methods,
        {m: Slot(m.key, m.module, m.shape, m.dtype, m.kind) for m in matrices},
        inputs,
        left,
        None,
        0,
        _output(recipe, model.source.id, main_method(methods), fmt, mix),
    )
    _check_format(work)
    events += [Event("left_dense", f"left as it is: {why}", key) for b in model.anatomy.blocks for key, why in b.left]
    work.events = _merged(events)
    if unused := model.anatomy.unused:
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        fate = "left out" if fmt.name == "gguf" else "copied as they are"
        message = f"{len(unused)} tensors on disk belong to no parameter of the model; {fate}: {shown}"
        work.events.append(Event("unused_tensors", message))
    if opened := sorted(model.weights.compressed - {m.key for m in methods}):
        message = f"{len(opened)} compressed matrices that are not compressed again are written dense: {opened[0]}"
        work.events.append(Event("decompressed", message + (", ..." if len(opened) > 1 else "")))
    work.quantization_config = fmt.config(list(layers(work)), sorted(_left_modules(work)), matrices[0].dtype)
    work.pack = pack
    if pack and (not isinstance(fmt, OwnFormat) or not fmt.code_bits(work.quantization_config or {})):
        raise PlanError(
            f"`pack` entropy-codes codes, and as {fmt.name} nothing here has any.",
            hint="Leave out `pack` (--pack), or choose bits or factor_bits, which make codes.",
        )
    rehearse(work)
    work.length = row_length(recipe.calibration.length, model, work.events)
    _lay_out_files(work)
    if fmt.name == "gguf":
        _draw(work, mix)
    return work


def refuse(problems: list[str], hint: str) -> None:
    """Raise PlanError with every problem on a line, if there are any."""
    if problems:
        shown = problems[:10] + ([f"... and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise PlanError("\n".join(["These layers cannot be done as asked:", *(f"  - {p}" for p in shown)]), hint=hint)


def row_length(asked: int | None, model: StreamedModel, events: list[Event]) -> int:
    """Tokens in a row: as asked, but never more than the model has positions for."""
    positions = model.positions or DEFAULT_LENGTH
    if asked is not None and asked > positions:
        message = f"rows of {asked} tokens cut to the model's {positions} positions"
        if not any(event.kind == "length_cut" and event.message == message for event in events):
            events.append(Event("length_cut", message))
    return min(asked or DEFAULT_LENGTH, positions)


def _output(recipe: Recipe, model_id: str, method: Method[Any], fmt: Format, mix: str | None) -> Path:
    """The folder of the result: as the recipe says, else out/<model>-<method>[-w<bits>], -<mix>, or -<format>."""
    if recipe.output is not None:
        return Path(recipe.output).expanduser()
    name, bits = method_name(method), getattr(method.config, "bits", None)
    if isinstance(method.config, ShareConfig):
        name += f"-{method.config.label}"
    if method.task == "export" or mix is not None:
        name, bits = mix or fmt.name, None
    return default_output(model_id, name if bits is None or name in ("nf4", "fp4") else f"{name}-w{bits}")


def default_output(model_id: str, what: str) -> Path:
    """The folder of a result that the recipe does not name."""
    label = re.sub(r"[^\w.\-]+", "-", Path(model_id).name or Path(model_id).resolve().name)
    return Path("out") / f"{label}-{what}"


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


def _check_format(work: Work) -> None:
    """Refuse what the format cannot hold, and what transformers would not read back."""
    name, given = work.format.name, list(layers(work))
    names: dict[str, list[str]] = {}
    for slot, layer in given:
        if layer.input is not None and layer.input.kind not in work.format.rounded_inputs:
            able = "bnb" if layer.input.kind == "llm-int8" else "compressed-tensors"
            names.setdefault(f"it cannot say that inputs are rounded so; {able} can", []).append(slot.name)
        elif why := work.format.check(slot, layer):
            names.setdefault(why, []).append(slot.name)
    problems = [f"{_some(found)}: {why}" for why, found in names.items()]
    if not problems and (why := work.format.check_all(given, _left_modules(work))):
        problems.append(f"the layers together: {why}")
    if not problems and (found := entry(stored(work), proof := PROOF.get(name, "transformers"))).support == "no":
        problems.append(f"{proof} would not load it: {found.reason}")
    hint = "choose another format or method, or leave the layers out with `ignore`"
    if main_method(work.methods).task == "export":
        hint = "--to dense holds every stored form; `llmshrink quantize` then makes codes that the format holds"
    refuse([f"format {name}: {p}" for p in problems], hint)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers ({names[0]}, ...)"


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
    """One file for each part: a resumed run keeps every finished file."""
    for number, part in enumerate(work.parts, 1):
        name = f"model-{number:05d}-of-{len(work.parts):05d}.safetensors"
        work.shards[part.index] = name
        work.shard_bytes[name] = safetensors.file_size(work.meta_tensors(part))


def _draw(work: Work, mix: str | None) -> None:
    """Describe the one file that the shards become.

    Raises:
        PlanError: llama.cpp does not run this model.
    """
    source = work.model.source
    tensors = {name: tensor for part in work.parts for name, tensor in work.meta_tensors(part).items()}
    name = Path(source.id).name or source.folder.name
    work.mix = mix
    try:
        work.blueprint = draw(source.config, source.tokenizer, tensors, type=mix, name=name, licence=source.licence)
        _ = work.blueprint.size  # everything is put into bytes once
    except (LookupError, TypeError, ValueError, struct.error) as error:  # numbers and names of a stranger
        raise PlanError(
            f"{source.id}: its configuration or vocabulary does not fit into GGUF ({type(error).__name__}: {error}).",
            hint="Look for values in config.json that are null, negative or no numbers, and for an empty vocabulary.",
        ) from error
    work.events += [Event("differs", note) for note in work.blueprint.notes]
