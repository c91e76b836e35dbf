"""The sizes of a model that can be made smaller, and where in its tensors each of them lies.

No table of tensor names is needed: the model is built once more, on `meta`, from a configuration in which one size is
smaller, and the dimensions that became smaller with it are those that have it. So transformers itself says what a
configuration can express. Two fused layouts, whose order no size tells, are in `model/families.py`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmshrink.errors import LlmshrinkError, PlanError
from llmshrink.model.anatomy import expert_index
from llmshrink.model.families import family_of
from llmshrink.model.skeleton import build
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.surgery import Surgery, Taken, reconfigured, stretches

NEURONS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim")  # what families call it
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_LAYER = re.compile(r"layer_types$|^no_rope_layers$|^mlp_layer_types$|^layers_block_type$")  # one entry for each
NUMBERS = ("mlp_only_layers", "full_attn_idxs", "cross_attention_layers")  # lists of layers' numbers
FIRST = ("max_window_layers", "first_k_dense_replace")  # how many layers, from the first on, are of a kind

Axis = tuple[str, int]  # of a tensor on disk: its name and the dimension


@dataclass(frozen=True)
class Width:
    """One size.

    Attributes:
        name: As a recipe has it.
        total: How many things there are: of heads, groups that share keys and values.
        each: What one of them counts for in the user's numbers: heads in a group.
        settings: The keys of a configuration that say it, each with its value for one thing.
        fixed: Keys that must be written out, as they would follow the size otherwise.
        axes: Where the things lie: the entries of each, for every stretch of the dimension that holds all of them.
        possible: Counts that the configuration takes; none: any.
        members: Tensors that belong to one thing as a whole, by name on disk: which.
    """

    name: str
    total: int
    each: int
    settings: Mapping[str, int]
    fixed: Mapping[str, int]
    axes: Mapping[Axis, tuple[int, ...]]
    possible: tuple[int, ...] = ()
    members: Mapping[str, int] = field(default_factory=dict)

    def changes(self, kept: int) -> dict[str, int]:
        """What a configuration says with so many things."""
        return {**{key: one * kept for key, one in self.settings.items()}, **self.fixed}


@dataclass(frozen=True)
class Chosen:
    """What is kept of a model.

    Attributes:
        blocks: Numbers of the blocks.
        inside: For each width of blocks the things that each block of the original keeps, int64, in order.
        channels: Those of the states between blocks; None: all.
    """

    blocks: tuple[int, ...]
    inside: Mapping[str, tuple[Tensor, ...]]
    channels: Tensor | None = None


def width_of(model: StreamedModel, name: str) -> Width:
    """Find a size.

    Raises:
        PlanError: the family's configuration cannot say it, or nothing is known of how it lies in a tensor; the hint
            names what can be cut.
    """
    try:
        return _FINDERS[name](model)
    except PlanError as error:
        possible = [f"--{other}" for other in _FINDERS if other != name and width_if_any(model, other) is not None]
        words = f"{', '.join(possible)} and --layers" if possible else "--layers"
        message = f"{type(model.model).__name__}: its {name} cannot be cut: {error}"
        raise PlanError(f"{message.rstrip('.')}.", hint=f"{words} can be cut.") from error


def width_if_any(model: StreamedModel, name: str) -> Width | None:
    """The same, or None where it cannot be cut: nobody looks for what could be instead."""
    try:
        return _FINDERS[name](model)
    except PlanError:
        return None


def _neurons(model: StreamedModel) -> Width:
    config = _text(model.source)
    for key in (key for key in NEURONS if hasattr(config, key)):
        total = getattr(config, key) or 4 * config.hidden_size  # GPT-2 may leave it out
        axes, joined = _smaller(model, {key: max(1, total // 2)}, total, max(1, total // 2))
        if joined:
            raise PlanError("its MLPs are experts")
        if axes:
            halves = {1: (1,), 2: (1, 1)} if _halves(model) else {1: (1,)}
            return Width("neurons", total, 1, {key: 1}, {}, _laid_out(axes, halves))
    raise PlanError("no key of its configuration says how many there are")


def _heads(model: StreamedModel) -> Width:
    config = _text(model.source)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    each = heads // groups
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if groups < 2:
        raise PlanError("all of them share one key and value")
    settings = {"num_attention_heads": each, "num_key_value_heads": 1}
    if not hasattr(config, "num_key_value_heads"):
        del settings["num_key_value_heads"]
    axes: dict[Axis, int] = {}
    why = "the size of each follows from the width of the model, and cannot be said apart from it"
    possible = []
    for count in range(1, groups):
        changes = {**{key: one * count for key, one in settings.items()}, "head_dim": size}
        try:
            axes, _ = _smaller(model, changes, groups, count)
            possible.append(count)
        except PlanError as error:
            why = str(error)
    if not axes:
        raise PlanError(why)
    names = {key: name for name, origin in model.map.origins.items() for key in origin.keys}
    for key, _ in axes:
        owner = model.model.get_submodule(names[key].rpartition(".")[0])
        if not isinstance(owner, nn.Linear | Conv1D):
            raise PlanError(f"{key} is a norm over all of them")
    known: dict[int, tuple[int, ...]] = {each * size: (each * size,), size: (size,)}
    family = family_of(model.source.config)
    if family is not None and family.layout == "last":
        known[(each + 2) * size] = (each * size, size, size)
    if family is not None and family.layout == "grouped":
        known[(each + 2) * size] = ((each + 2) * size,)
    places = _laid_out(axes, known)
    return Width("heads", groups, each, settings, {"head_dim": size}, places, (*possible, groups))


def _hidden(model: StreamedModel) -> Width:
    config = _text(model.source)
    total = config.hidden_size
    size = getattr(config, "head_dim", None) or total // config.num_attention_heads
    axes, joined = _smaller(model, {"hidden_size": total // 2, "head_dim": size}, total, total // 2)
    both = [key for key, axis in axes if axis and (key, 0) in axes]
    if both or joined or any(unit != 1 for unit in axes.values()):
        what = (both or joined or [key for (key, _), unit in axes.items() if unit != 1])[0]
        raise PlanError(f"more than the states would shrink with it: {what}")
    return Width("hidden", total, 1, {"hidden_size": 1}, {"head_dim": size}, dict.fromkeys(axes, (1,)))


def _experts(model: StreamedModel) -> Width:
    config = _text(model.source)
    key = next((key for key in EXPERTS if getattr(config, key, None)), None)
    if key is None:
        raise PlanError("it has none")
    total, used = getattr(config, key), getattr(config, "num_experts_per_tok", None) or 1
    if (getattr(config, "n_group", None) or 1) > 1:
        raise PlanError("its router chooses among groups of them")
    axes, joined = _smaller(model, {key: used}, total, used) if used < total else ({}, [])
    keys = [key for name in joined for key in model.map.origins[name].keys]
    members = {key: expert_index(key) for key in keys}
    if not axes or set(members.values()) != set(range(total)):
        raise PlanError(f"each token has all {total}" if used >= total else "nothing is known of how they lie")
    places = _laid_out(axes, {1: (1,)})
    return Width("experts", total, 1, {key: 1}, {}, places, tuple(range(used, total + 1)), members)


_FINDERS: dict[str, Callable[[StreamedModel], Width]] = {
    "neurons": _neurons,
    "heads": _heads,
    "hidden": _hidden,
    "experts": _experts,
}


def _text(source: Source) -> Any:
    return source.config.get_text_config(decoder=True)


def _halves(model: StreamedModel) -> bool:
    family = family_of(model.source.config)
    return family is not None and family.halves


def _smaller(model: StreamedModel, changes: Mapping[str, int], old: int, new: int) -> tuple[dict[Axis, int], list[str]]:
    """The dimensions that become smaller with a size, with the entries for one thing; parameters of several tensors."""
    source = model.source
    try:
        config = reconfigured(source.config, changed_config(source, changes))
        state = build(config, model.dtype, all_meta=True).state_dict()
    except LlmshrinkError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a family's configuration refuses is the answer
        raise PlanError(str(error).strip().rpartition("\n")[2].strip()) from error
    own: dict[str, Tensor] = model.model.state_dict(keep_vars=True)
    axes, joined = {}, []
    for name, origin in model.map.origins.items():
        before, after = tuple(own[name].shape), tuple(state[name].shape) if name in state else None
        if before == after:
            continue
        if after is None or model.map.joined(name):
            joined.append(name)
            continue
        for axis, (whole, part) in enumerate(zip(before, after, strict=True)):
            if whole != part:
                axes[origin.keys[0], axis] = (whole - part) // (old - new) if whole > part else 0
    return axes, joined


def _laid_out(axes: Mapping[Axis, int], known: Mapping[int, tuple[int, ...]]) -> dict[Axis, tuple[int, ...]]:
    odd = [key for (key, _), unit in axes.items() if unit not in known]
    if odd:
        raise PlanError(f"nothing is known of how they lie in {odd[0]}")
    return {axis: known[unit] for axis, unit in axes.items()}


def changed_config(source: Source, changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with other values, under the names that it has them by already."""
    data = deepcopy(source.config_dict)
    text = _text(source)
    place = data
    if text is not source.config:
        name = next((name for name in source.config.sub_configs if getattr(source.config, name, None) is text), None)
        if name is None or not isinstance(data.get(name), dict):
            raise PlanError(f"{source.id}: config.json does not say the sizes of its text model in one place.")
        place = data[name]
    for key, value in changes.items():
        spelled = text.attribute_map.get(key, key)
        others = [name for name, real in text.attribute_map.items() if real == spelled]
        there = [name for name in dict.fromkeys((key, spelled, *others)) if name in place]
        for name in there or [spelled]:
            place[name] = value
    return data


def operate(model: StreamedModel, widths: Iterable[Width], chosen: Chosen) -> Surgery:
    """The surgery that keeps what was chosen."""
    widths = list(widths)
    changes: dict[str, Any] = {}
    for width in widths:
        kept = len(chosen.channels) if chosen.channels is not None and width.name == "hidden" else 0
        changes |= width.changes(kept or len(chosen.inside[width.name][0]))
    if len(chosen.blocks) < len(model.anatomy.blocks):
        changes |= _of_layers(model, chosen.blocks)
    homes = _homes(model)
    number = {old: new for new, old in enumerate(chosen.blocks)}
    tensors: dict[str, Taken] = {}
    for key, info in model.weights.infos.items():
        home = homes.get(key)
        if home is not None and home not in number:
            continue
        name, kept_along = key, dict[int, Tensor]()
        for width in widths:
            if (number_of := width.members.get(key)) is not None:
                left = chosen.inside[width.name][home or 0].tolist()
                if number_of not in left:
                    break
                name = _as_expert(key, left.index(number_of))
            for axis in range(len(info.shape)):
                if units := width.axes.get((key, axis)):
                    things = chosen.channels if width.name == "hidden" else chosen.inside[width.name][home or 0]
                    assert things is not None
                    kept_along[axis] = stretches(units, width.total, things)
        else:
            name = name if home is None or home == number[home] else _renumbered(name, home, number[home])
            tensors[name] = Taken(key, kept_along)
    return Surgery(changed_config(model.source, changes), tensors, chosen.blocks, chosen.channels)


def _homes(model: StreamedModel) -> dict[str, int]:
    """The block that each tensor on disk belongs to, those that no parameter takes among them."""
    found = {key: block.index for block in model.anatomy.blocks for key in block.keys}
    stems = {key[: _number(key, index).start()]: None for key, index in found.items()}
    for key in model.anatomy.unused:
        for stem in stems:
            if (match := re.match(rf"{re.escape(stem)}(\d+)\.", key)) and int(match[1]) < len(model.anatomy.blocks):
                found[key] = int(match[1])
    return found


def _number(key: str, index: int) -> re.Match[str]:
    match = re.search(rf"(?:(?<=^)|(?<=\.)){index}(?=\.)", key)
    if match is None:
        raise PlanError(f"{key!r} does not say which block it belongs to: layers cannot be renumbered.")
    return match


def _renumbered(key: str, old: int, new: int) -> str:
    match = _number(key, old)
    return f"{key[: match.start()]}{new}{key[match.end() :]}"


def _as_expert(key: str, number: int) -> str:
    """The name of what belongs to an expert, with another number: the last one in it."""
    before, _, after = re.fullmatch(r"(.*\.)(\d+)(\..*)", key).groups()  # type: ignore[union-attr]
    return f"{before}{number}{after}"


def _of_layers(model: StreamedModel, kept: tuple[int, ...]) -> dict[str, Any]:
    """What the configuration says of fewer layers: their number, and all that it says of each."""
    config, total = _text(model.source), len(model.anatomy.blocks)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == total and PER_LAYER.search(key):
            changes[key] = [value[i] for i in kept]  # written out even where it followed from a rule
        elif key in NUMBERS and isinstance(value, list):
            changes[key] = [kept.index(i) for i in value if i in kept]
        elif key in FIRST and isinstance(value, int):
            changes[key] = sum(i < value for i in kept)
    return changes


def other_constant(whole: StreamedModel, small: StreamedModel, blocks: Iterable[int]) -> str | None:
    """A number, switch or word that no weight holds, and that the smaller model has otherwise; None: there is none.

    Some families make them of the width or of a layer's number: factors of embeddings, scales of attention.

    Args:
        whole: the original.
        small: what is left of it.
        blocks: for each block of the latter its number in the original.
    """
    ends = [block.prefix for block in small.anatomy.blocks]
    homes = {whole.anatomy.blocks[old].prefix: end for old, end in zip(blocks, ends, strict=True)}
    apart = tuple(f"{block.prefix}." for block in whole.anatomy.blocks)
    known = dict(small.model.named_modules())
    for name, module in whole.model.named_modules():
        home = next((home for home in homes if name == home or name.startswith(f"{home}.")), None)
        if home is None and f"{name}.".startswith(apart):
            continue
        twin = known.get(name if home is None else f"{homes[home]}{name.removeprefix(home)}")
        if twin is None:
            continue
        kinds = float | bool if isinstance(module, PreTrainedModel) else float | bool | str  # folders have names
        for key, value in vars(module).items():
            other = vars(twin).get(key, value)
            if isinstance(value, kinds) and value != other:
                return f"{key} of {name or 'the model'} would be {other}, and is {value}"
        for key in module._non_persistent_buffers_set:  # others are on disk
            table, other = module._buffers[key], twin._buffers.get(key)
            if table is not None and other is not None and table.shape == other.shape and not torch.equal(table, other):
                return f"the table {key} of {name or 'the model'} would be another"
    return _other_property(_text(whole.source), _text(small.source))


def _other_property(before: Any, after: Any) -> str | None:
    """A number that a configuration works out, and that the smaller one has otherwise; None: there is none."""
    for key, kind in inspect.getmembers(type(before)):
        if isinstance(kind, property) and not hasattr(PretrainedConfig, key):
            values = [getattr(config, key, None) for config in (before, after)]
            if isinstance(values[0], float) and values[0] != values[1]:
                return f"{key} of the configuration would be {values[1]}, and is {values[0]}"
    return None


def all_of(model: StreamedModel, widths: Iterable[Width], counts: Mapping[str, int], blocks: int) -> Chosen:
    """The first of everything: what has the right shapes before anything was measured."""
    layers = len(model.anatomy.blocks)
    inside = {width.name: (torch.arange(counts[width.name]),) * layers for width in widths if width.name != "hidden"}
    channels = torch.arange(counts["hidden"]) if "hidden" in counts else None
    return Chosen(tuple(range(blocks)), inside, channels)
