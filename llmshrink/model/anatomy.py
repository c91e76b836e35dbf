"""The blocks of a model, the matrices in each, and which of them are fed by the same tensor.

Everything is found by structure, on `meta`: the one ModuleList of blocks, the linears, Conv1Ds and fused
experts in each, and, by running one block's forward pass on tensors without data, the linears that receive the very
same input. No table of families is needed for that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmshrink.errors import InputError, PlanError
from llmshrink.formats.base import Kind
from llmshrink.io.safetensors import TensorInfo
from llmshrink.model.capture import Record, Recorder
from llmshrink.model.mapping import WeightMap
from llmshrink.model.skeleton import drop_parameters, set_parameter

ANY_TOKEN = 2  # of every vocabulary; 0 and 1 are often for padding


@dataclass(frozen=True)
class Site:
    """A place where an input can be seen: a linear module, or one expert's first or second matrix in a fused module."""

    module: str
    expert: int | None = None
    leaf: str = "weight"


@dataclass(frozen=True)
class Matrix:
    """One 2-D weight on disk: the unit of compression. Seen as [out, in] whatever the disk's order."""

    key: str  # name on disk, e.g. model.layers.0.mlp.experts.3.up_proj.weight
    parameter: str  # the parameter in memory that it is, or is a part of
    site: Site
    shape: tuple[int, int]  # [out, in]
    dtype: torch.dtype
    kind: Kind
    module: str  # module name as loaders match it (of the key for experts, which are no modules in memory)

    @property
    def name(self) -> str:
        """The key without `.weight`."""
        return self.key.removesuffix(".weight")

    @property
    def transposed(self) -> bool:
        """Whether the disk has it as [in, out]."""
        return self.kind == "conv1d"

    def seen(self, weight: Tensor) -> Tensor:
        """The weight, in the disk's order, as [out, in]."""
        return weight.T if self.transposed else weight

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Group:
    """Matrices whose input is the same tensor, in the order of the forward pass."""

    sites: tuple[Site, ...]
    matrices: tuple[Matrix, ...]

    @property
    def width(self) -> int:
        """Input features."""
        return self.matrices[0].shape[1]


@dataclass(frozen=True)
class Part:
    """A stretch of the model that is compressed, written and journaled at a time."""

    index: int  # -1 before the blocks, the block's own, their number behind them
    keys: tuple[str, ...]  # on disk
    groups: tuple[Group, ...]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All its matrices."""
        return tuple(m for g in self.groups for m in g.matrices)


@dataclass(frozen=True)
class Block(Part):
    """One layer of a decoder or encoder."""

    prefix: str  # in memory, e.g. model.layers.0
    parameters: tuple[str, ...]  # in memory: parameters and persistent buffers
    left: tuple[tuple[str, str], ...]  # 2-D or larger weights that no method sees, and why


@dataclass(frozen=True)
class Anatomy:
    """A model's blocks, and the tensors outside them."""

    blocks: tuple[Block, ...]
    embedding: Matrix | None  # of tokens; also the head, where both are tied
    head: Matrix | None  # that is not tied
    tied: bool  # whether the embedding is the head too
    copies: tuple[str, ...]  # keys on disk of a tied head: its values are the embedding's, and nobody looks at these
    others: tuple[str, ...]  # keys on disk outside the blocks: embeddings, final norm, head
    unused: tuple[str, ...]  # keys on disk that no parameter takes; copied as they are
    returns: int | None  # how long a tuple the blocks return; None: a tensor

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All matrices, in the order of the forward pass."""
        inside = (m for block in self.blocks for m in block.matrices)
        return tuple(m for m in (self.embedding, *inside, self.head) if m is not None)


def block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of blocks.

    Raises:
        PlanError: no list, or more than one, could be it; the candidates are named.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    kinds = set(model._no_split_modules or ())
    lists = _lists(decoder)
    if not lists:  # what a few families call their decoder is a head
        prefix, lists = "", _lists(model)
    deep = [(name, m) for name, m in lists if len(m) == count]
    found = [(name, m) for name, m in deep if type(m[0]).__name__ in kinds] or deep
    if len(found) != 1:
        seen = ", ".join(f"{name} ({len(m)} x {type(m[0]).__name__})" for name, m in lists) or "none"
        which = f"the {count} blocks" if count else "its blocks"
        raise PlanError(f"{type(model).__name__}: cannot tell which list holds {which}; lists: {seen}.")
    name, blocks = found[0]
    return f"{prefix}.{name}" if prefix else name, blocks


def _lists(module: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m)]


def dissect(
    model: PreTrainedModel, meta: PreTrainedModel, weights: WeightMap, infos: Mapping[str, TensorInfo]
) -> Anatomy:
    """Find blocks, matrices and groups.

    Args:
        model: the skeleton.
        meta: the same model with its buffers on `meta` too, for the forward pass without data.
        weights: the map between disk and memory.
        infos: shapes and dtypes on disk.

    Raises:
        InputError: parameters without a tensor on disk, or of another shape.
    """
    _check_complete(model, weights, infos)
    prefix, blocks = block_list(model)
    meta_blocks = block_list(meta)[1]
    record, returns = _record_on_meta(model, list(blocks))
    orders: dict[Any, list[list[Site]]] = {}
    found: list[Block] = []
    inside: set[str] = set()
    for index in range(len(blocks)):
        name = f"{prefix}.{index}"
        parameters = tuple(p for p in weights.origins if p.startswith(name + "."))
        keys = tuple(k for p in parameters for k in weights.origins[p].keys)
        matrices, left = _matrices(model, parameters, weights, infos)
        signature = tuple(
            (p.removeprefix(name), tuple(model.get_parameter(p).shape)) for p in parameters if _is_parameter(model, p)
        )
        if signature not in orders:
            try:
                orders[signature] = _input_groups(meta_blocks[index], name, index, record)
            except RuntimeError as error:
                raise _without_data(model, error) from error
        groups = _group(matrices, orders[signature], name, prefix)
        found.append(Block(index, keys, groups, name, parameters, tuple(left)))
        inside.update(keys)
    others = tuple(k for k in infos if k not in inside and k not in weights.unused)
    table = _outside(model, model.get_input_embeddings(), "embedding", weights, infos)
    tied = model.config.get_text_config(decoder=True).tie_word_embeddings  # a copy on disk is never looked at
    output = model.get_output_embeddings()
    head = None if tied else _outside(model, output, "head", weights, infos)
    shared = bool(tied) and table is not None and isinstance(output, nn.Linear)
    copies = _copies(model, output, weights, table) if shared else ()
    return Anatomy(tuple(found), table, head, shared, copies, others, tuple(weights.unused), returns)


def _copies(model: PreTrainedModel, head: nn.Module, weights: WeightMap, table: Matrix | None) -> tuple[str, ...]:
    """The keys on disk of a head's weight, but for the table that it is tied to."""
    origins = [weights.origins.get(f"{name}.weight") for name, module in model.named_modules() if module is head]
    return tuple(key for found in origins if found for key in found.keys if table is None or key != table.key)


def _outside(
    model: PreTrainedModel, module: nn.Module | None, kind: Kind, weights: WeightMap, infos: Mapping[str, TensorInfo]
) -> Matrix | None:
    """The matrix of an embedding or a head that has one of its own on disk, else None."""
    if not isinstance(module, nn.Embedding | nn.Linear):
        return None
    name = next(n for n, m in model.named_modules() if m is module)
    parameter = f"{name}.weight"
    if parameter not in weights.origins or weights.joined(parameter):
        return None
    key = weights.origins[parameter].keys[0]
    rows, cols = infos[key].shape
    return Matrix(key, parameter, Site(name), (rows, cols), infos[key].dtype, kind, name)


def _is_parameter(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(owner)._parameters


def _check_complete(model: PreTrainedModel, weights: WeightMap, infos: Mapping[str, TensorInfo]) -> None:
    if weights.missing:
        shown = ", ".join(weights.missing[:3])
        raise InputError(
            f"{len(weights.missing)} parameters of {type(model).__name__} have no tensor on disk "
            f"({shown}{', ...' if len(weights.missing) > 3 else ''}).",
            hint="The checkpoint is incomplete, or its config.json describes another model.",
        )
    state = model.state_dict()
    for name, origin in weights.origins.items():
        shape = infos[origin.keys[0]].shape
        if not weights.joined(name) and shape != tuple(state[name].shape):
            raise InputError(
                f"Tensor {origin.keys[0]!r} is {list(shape)} on disk, but config.json asks for "
                f"{list(state[name].shape)}.",
                hint="The weights and config.json do not belong together.",
            )


def _matrices(
    model: PreTrainedModel, parameters: tuple[str, ...], weights: WeightMap, infos: Mapping[str, TensorInfo]
) -> tuple[list[Matrix], list[tuple[str, str]]]:
    """The matrices among the parameters of a block, and the larger weights that are none."""
    found: list[Matrix] = []
    left: list[tuple[str, str]] = []
    for parameter in parameters:
        owner_name, _, leaf = parameter.rpartition(".")
        if not _is_parameter(model, parameter):
            continue
        owner, keys = model.get_submodule(owner_name), weights.origins[parameter].keys
        linear = isinstance(owner, nn.Linear | Conv1D) and leaf == "weight"
        experts = hasattr(owner, "is_transposed") and hasattr(owner, leaf) and weights.joined(parameter)
        for key in keys:
            info = infos[key]
            if len(info.shape) < 2:
                continue
            if not (linear and len(keys) == 1) and not (experts and len(info.shape) == 2):
                left.append((key, f"{type(owner).__name__}.{leaf} is not a linear"))
                continue
            if linear and _is_router(model, owner_name, info.shape[0]):
                left.append((key, "it is a router"))
                continue
            kind = "experts" if experts else _kind(owner)
            rows, cols = info.shape
            shape = (cols, rows) if kind == "conv1d" else (rows, cols)
            site = Site(owner_name, expert_index(key), leaf) if experts else Site(owner_name)
            module = key.removesuffix(".weight") if experts else owner_name
            found.append(Matrix(key, parameter, site, shape, info.dtype, kind, module))
    return found, left


def _is_router(model: nn.Module, name: str, outputs: int) -> bool:
    """Whether a linear beside fused experts has one output for each: few weights, on which much depends."""
    parents = name.split(".")[:-1]
    above = [model.get_submodule(".".join(parents[:depth])) for depth in range(1, len(parents) + 1)]
    fused = [child for parent in above[-2:] for child in parent.children() if hasattr(child, "is_transposed")]
    return any(child.num_experts == outputs for child in fused)


def _kind(linear: nn.Module) -> Kind:
    if isinstance(linear, Conv1D):
        return "conv1d"
    return "linear" if type(linear) is nn.Linear else "subclass"


def expert_index(key: str) -> int:
    """The expert's number in a key such as model.layers.0.mlp.experts.3.up_proj.weight."""
    return int(re.findall(r"\.(\d+)(?=\.)", key)[-1])


def _group(matrices: list[Matrix], order: list[list[Site]], name: str, prefix: str) -> tuple[Group, ...]:
    """Matrices put together by the sites that the forward pass saw, in its order."""
    by_site: dict[Site, list[Matrix]] = {}
    for matrix in matrices:
        by_site.setdefault(matrix.site, []).append(matrix)
    groups = []
    for sites in order:
        here = tuple(Site(re.sub(rf"^{re.escape(prefix)}\.\d+", name, s.module), s.expert, s.leaf) for s in sites)
        members = tuple(m for s in here for m in by_site.pop(s, []))
        if members:
            groups.append(Group(here, members))
    # A linear that the pass never reached still is a matrix; it stands alone.
    groups += [Group((site,), tuple(members)) for site, members in by_site.items()]
    return tuple(groups)


def _record_on_meta(model: PreTrainedModel, blocks: list[nn.Module]) -> tuple[Record, int | None]:
    """What the blocks are called with for four positions, as tensors on `meta`, and how they return theirs.

    Masks and position tables are computed from real values, so the pass runs on the skeleton; what stands before the
    blocks (embeddings, learned positions, a norm) is one zero for the moment, seen in the shape of each parameter.
    """
    inside = {id(p) for block in blocks for p in block.parameters()}
    stem = [n for n, p in model.named_parameters() if id(p) not in inside]
    try:
        for name in stem:
            parameter = model.get_parameter(name)
            set_parameter(model, name, torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
        with Recorder(model, blocks) as recorder:
            record = recorder.record(input_ids=torch.full((1, 4), ANY_TOKEN))
            returns = recorder.returns
    except RuntimeError as error:
        raise _without_data(model, error) from error
    finally:
        drop_parameters(model, stem)
        model.tie_weights()
    hidden, arguments = tree_map_only(Tensor, lambda t: t.to("meta"), (record.hidden, record.arguments))
    return Record(hidden, arguments), returns


def _without_data(model: nn.Module, error: RuntimeError) -> PlanError:
    reason = str(error).partition("\n")[0]
    return PlanError(f"{type(model).__name__}: what it computes depends on data too early to plan for: {reason}")


def _input_groups(block: nn.Module, name: str, index: int, record: Record) -> list[list[Site]]:
    """Sites of one block on `meta` in the order of its forward pass, those with the very same input together."""
    seen: dict[Any, list[Site]] = {}
    alive: list[Tensor] = []  # an input that dies could lend its address to the next

    def observe(site: Site, x: Tensor) -> None:
        alive.append(x)
        key: tuple[Any, ...] = (x.untyped_storage()._cdata, x.storage_offset(), x._version, x.shape[-1], x.numel())
        if site.expert is not None:  # each expert has its own rows
            key = (*key, site.expert, site.leaf)
        if site not in (sites := seen.setdefault(key, [])):
            sites.append(site)

    with torch.no_grad(), watch(block, name, observe):
        record.run(block, index, record.hidden)
    return list(seen.values())


def _look(observe: Callable[[Site, Tensor], None], site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    observe(site, args[0])


@contextmanager
def watch(block: nn.Module, name: str, observe: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Call `observe(site, x)` for the input of every linear, Conv1D and fused expert in the block called `name`."""
    handles, experts = [], []
    for path, module in block.named_modules(prefix=name):
        if isinstance(module, nn.Linear | Conv1D):
            site = Site(path)
            look = partial(_look, observe, site)
            handles.append(module.register_forward_pre_hook(look, prepend=True))  # before inputs are rounded
        elif hasattr(module, "is_transposed"):
            module.observer = lambda e, leaf, x, path=path: observe(Site(path, e, leaf), x)
            experts.append(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in experts:
            del module.observer
