"""A model of which one block at a time is in memory; the embedding and the head stay mapped from their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmshrink.errors import InputError, PlanError
from llmshrink.formats.base import Rows
from llmshrink.forms import InputScheme
from llmshrink.model.anatomy import Anatomy, Block, Matrix, Site, block_list, dissect
from llmshrink.model.capture import Record, Recorder
from llmshrink.model.mapping import WeightMap
from llmshrink.model.rounding import round_inputs
from llmshrink.model.skeleton import build, drop_parameters, room_of, set_parameter
from llmshrink.model.source import Source
from llmshrink.model.task import Task, positions, task_of
from llmshrink.model.weights import Weights

BATCH_TOKENS = 1024  # of one forward pass at most, and ...
ACTIVATIONS = 1 << 20  # ... elements in the widest activation: what is small stays in the cache
LOGITS = 256 << 20  # bytes of one model's logits to ask for at a time
HEAD_ROWS = 8192  # rows of the head converted to the compute dtype at a time


@dataclass(frozen=True)
class Decoded:
    """What stands for a matrix of the checkpoint once it was compressed."""

    weight: Callable[[], Tensor]  # gives what the codes mean, float32 [out, in]
    input: InputScheme | None = None  # None: inputs are not rounded


class StreamedModel:
    """Runs a checkpoint block by block, in memory that does not grow with its depth."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source = source
        self.device = device
        self._original: StreamedModel | None = None
        config = source.config
        self._refuse_more_blocks()
        self.task: Task = task_of(config)
        self._stored: torch.dtype | None = config.dtype
        # A CPU computes fastest and most exactly in float32; a GPU in what the checkpoint is stored in.
        self.dtype = torch.float32 if device.type == "cpu" or self._stored is None else self._stored
        self._room = room_of(source.checkpoint.infos)
        meta = build(config, self.dtype, room=self._room, all_meta=True)  # first: whatever it asks for takes no memory
        self.model = build(config, self.dtype, room=self._room)
        self.weights = Weights(source.checkpoint, source.quantization, self._stored)
        self.map = WeightMap(self.model, self.weights.infos)
        modules = {
            k: n.rpartition(".")[0] for n, o in self.map.origins.items() if not self.map.joined(n) for k in o.keys
        }
        conv1d = [key for name, origin in self.map.origins.items() if self._is_conv1d(name) for key in origin.keys]
        self.weights.place(modules, conv1d)
        self._names = {origin.keys[0]: name for name, origin in self.map.origins.items()}
        self.anatomy: Anatomy = dissect(self.model, meta, self.map, self.weights.infos)
        self._refuse_ignored()
        self._blocks = list(block_list(self.model)[1])
        self._moved = False
        self._replaced: dict[str, Callable[[Rows], Tensor]] = {}
        self._rounding: dict[int, ExitStack] = {}  # of the blocks in memory
        self._recorder = Recorder(self.model, self._blocks, self.anatomy.returns)

    @property
    def original(self) -> StreamedModel:
        """The model that this one was made from by stages before; itself, where there were none."""
        return self._original or self

    @original.setter
    def original(self, model: StreamedModel | None) -> None:
        self._original = model

    def _refuse_more_blocks(self) -> None:
        """Nothing is built from a number of blocks that the tensors on disk cannot fill."""
        blocks = getattr(self.source.config.get_text_config(decoder=True), "num_hidden_layers", None)
        tensors = len(self.source.checkpoint.infos)
        if isinstance(blocks, int) and blocks > tensors:
            raise InputError(
                f"{self.source.folder / 'config.json'} says {blocks} blocks, and there are {tensors} tensors on disk."
            )

    def _refuse_ignored(self) -> None:
        """Tensors of compressed layers that no parameter takes, and that say something.

        AutoGPTQ writes biases of zero for linears that have none; AWQ puts scales behind activations.
        """
        for key in self.anatomy.unused if self.weights.compressed else ():
            owned = f"{key.rpartition('.')[0]}.weight" in self.weights.compressed or key.endswith(".scales")
            if owned and bool(self.weights.get(key).any()):
                raise PlanError(
                    f"{self.source.folder}: {key!r} belongs to what is compressed, but {type(self.model).__name__} has "
                    "no place for it: without it the model is another one."
                )

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        width: int = self.source.config.get_text_config(decoder=True).hidden_size
        return width

    @property
    def vocabulary(self) -> int:
        """Tokens that it knows."""
        size: int = self.source.config.get_text_config(decoder=True).vocab_size
        return size

    @property
    def width(self) -> int:
        """Values in its output for a token, or for a row."""
        if self.task.gives == "logits":
            return self.vocabulary
        classes: int = self.source.config.num_labels
        return classes if self.task.gives == "class logits" else self.hidden

    @property
    def distribution(self) -> bool:
        """Whether the softmax of its output is a distribution: over tokens, or over classes of which one holds."""
        labels = self.task.gives == "class logits"
        other = getattr(self.source.config, "problem_type", None) in ("multi_label_classification", "regression")
        return self.task.gives == "logits" or (labels and self.width > 1 and not other)

    @property
    def positions(self) -> int | None:
        """Tokens that a row can have at most, or None where nothing bounds them."""
        return positions(self.model)

    @property
    def parameters(self) -> int:
        """Weights of the model; tensors on disk that belong to none are not counted."""
        return sum(info.numel for key, info in self.weights.infos.items() if key not in self.anatomy.unused)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors when nothing is compressed."""
        return sum(info.bytes for info in self.weights.infos.values())

    def batch_tokens(self, asked: int | None) -> int:
        """Tokens of one forward pass: as asked, or so many that activations stay small."""
        widest = max((max(m.shape) for block in self.anatomy.blocks for m in block.matrices), default=1)
        return asked or max(1, min(BATCH_TOKENS, ACTIVATIONS // widest))

    def whole(self, dtype: torch.dtype | None = None, *, as_read: bool = False) -> PreTrainedModel:
        """A model of its own with all weights in memory, in its own dtype; decoded where they are compressed.

        Args:
            dtype: another one.
            as_read: round what transformers rounds while it decodes.
        """
        dtype = dtype or self._stored or self.dtype
        model = build(self.source.config, dtype, room=self._room)

        kinds = {m.key: m.kind for block in self.anatomy.blocks for m in block.matrices} if as_read else {}

        def get(key: str) -> Tensor:
            compressed = key in kinds and key in self.weights.compressed
            tensor = self.weights.as_read(key, kinds[key]) if compressed else self.weights.get(key)
            return tensor.to(self.device, dtype if tensor.is_floating_point() else tensor.dtype)

        for name in self.map.origins:
            set_parameter(model, name, self.map.build(name, get).contiguous())
        model.tie_weights()
        for block in self.anatomy.blocks:
            round_inputs(model, self._inputs(block, {}))
        return model.to(self.device)

    # --- blocks

    def load_block(self, index: int, decoded: Mapping[str, Decoded] | None = None) -> None:
        """Put one block into memory, in the compute dtype; it rounds inputs where what is loaded says so.

        Args:
            index: which block.
            decoded: for keys on disk whose matrix was compressed: what to load in its place.
        """
        block = self.anatomy.blocks[index]
        for name in block.parameters:
            self._set(name, decoded or {})
        self._rounding.pop(index, ExitStack()).close()
        self._rounding[index] = round_inputs(self.model, self._inputs(block, decoded or {}))

    def drop_block(self, index: int) -> None:
        """Free one block."""
        self._rounding.pop(index, ExitStack()).close()
        drop_parameters(self.model, list(self.anatomy.blocks[index].parameters))

    def read(self, matrix: Matrix) -> Tensor:
        """One matrix as stored in the checkpoint, seen as [out, in], on the compute device."""
        return matrix.seen(self.weights.get(matrix.key)).to(self.device)

    def _inputs(self, block: Block, decoded: Mapping[str, Decoded]) -> dict[Site, InputScheme]:
        """How the inputs of a block's linears are rounded, where they are."""
        found = {
            m.site: decoded[m.key].input if m.key in decoded else self.weights.input(m.key) for m in block.matrices
        }
        return {site: scheme for site, scheme in found.items() if scheme is not None}

    def _set(self, name: str, decoded: Mapping[str, Decoded]) -> None:
        def get(key: str) -> Tensor:
            if key in decoded:
                return self._turned(name, {key: decoded[key].weight().to(self.device, self.dtype)}, key)
            tensor = self.weights.get(key)
            # A copy even where the dtype is right already: parameters must not lie in a file that is mapped.
            return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

        set_parameter(self.model, name, self.map.build(name, get).contiguous())

    def _is_conv1d(self, name: str) -> bool:
        return isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D)

    # --- before and behind the blocks

    def record(self, tokens: Tensor) -> Record:
        """What the blocks are called with for a batch of token ids [rows, length]."""
        self._load_outside()
        return self._recorder.record(input_ids=tokens.to(self.device))

    def run(self, index: int, record: Record, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output of the loaded block for a batch of the recorded shape.

        `weights` stand in for matrices [out, in] and vectors by their keys on disk, and gradients reach them; the
        parameters that they are part of must be theirs alone, and only one thread may run the block.
        """
        return record.run(self._blocks[index], index, hidden, self._made_of(index, weights) if weights else None)

    def complete(self, matrices: Iterable[Matrix]) -> list[Matrix]:
        """Those whose parameter is made of none but these: of fused experts all, or none."""
        found = list(matrices)
        keys = {matrix.key for matrix in found}
        return [matrix for matrix in found if keys.issuperset(self.map.origins[matrix.parameter].keys)]

    def vectors(self, keys: Iterable[str]) -> list[str]:
        """Those of these keys on disk that are vectors of parameters: weights of norms, biases."""
        flat = [k for k in keys if k in self._names and len(self.weights.infos[k].shape) == 1]
        own = dict(self.model.named_parameters(remove_duplicate=False))
        names = {key: self._names[key] for key in flat if self.weights.infos[key].dtype.is_floating_point}
        return [key for key, name in names.items() if name in own and not self.map.joined(name)]

    def _made_of(self, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of a block, by their names in it, that are made of these matrices."""
        block, made = self.anatomy.blocks[index], {}
        for name in block.parameters:
            if self.map.origins[name].keys[0] in weights:
                part = self.map.build(name, partial(self._turned, name, weights))
                made[name.removeprefix(f"{block.prefix}.")] = part.to(self.dtype)
        return made

    def _turned(self, name: str, weights: Mapping[str, Tensor], key: str) -> Tensor:
        """A matrix [out, in], or a vector, as the parameter `name` holds it."""
        return weights[key].T if weights[key].ndim == 2 and self._is_conv1d(name) else weights[key]

    def output(self, tokens: Tensor, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the model gives out [rows, length, width] for the last block's output; length 1 for classes of rows.

        `weights` stand in for vectors outside the blocks by their keys on disk; where they are given, gradients reach
        them and `hidden` (not for classes of rows).
        """
        self._load_outside()
        tokens, hidden = tokens.to(self.device), hidden.to(self.device)
        if not self.task.by_row:
            own = None if weights is None else {self._names[key]: value for key, value in weights.items()}
            return self.task.output(self._recorder.finish(tokens, hidden, own))
        # One by one: a decoder without a token for padding cannot tell where several rows end.
        rows = zip(torch.split(tokens, 1), torch.split(hidden, 1), strict=True)
        return torch.cat([self.task.output(self._recorder.finish(*row)) for row in rows])

    def head_input(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the head is applied to [rows, length, hidden], for the last block's output; it is not applied."""
        self._load_outside()
        found: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Seen

        handle = self.model.get_output_embeddings().register_forward_pre_hook(see)
        with suppress(_Seen):
            self._recorder.finish(tokens.to(self.device), hidden.to(self.device))
        handle.remove()
        return found[0]

    def replace(self, matrix: Matrix, rows: Callable[[Rows], Tensor]) -> None:
        """Take these rows for the embedding (a head tied to it has them too) or for the head, from now on."""
        self._replaced, self._moved = {matrix.key: rows}, False

    def _read_by_row(self) -> dict[str, list[nn.Embedding | nn.Linear]]:
        """The modules whose rows a CPU reads where they are used, by their key; a GPU holds all in full."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        table, own = self.anatomy.embedding, self.anatomy.head
        found: dict[str, list[nn.Embedding | nn.Linear]] = {}
        for module, matrix in ((embedding, table), (head, own or table)):
            if self.device.type == "cpu" and type(module) in (nn.Embedding, nn.Linear) and matrix is not None:
                found.setdefault(matrix.key, []).append(module)
        return found

    def _load_outside(self) -> None:
        if self._moved:
            return
        self._moved = True
        inside = {p for block in self.anatomy.blocks for p in block.parameters}
        by_row = self._read_by_row()
        replaced = {key: Decoded(partial(rows, slice(None))) for key, rows in self._replaced.items()}
        for name in self.map.origins:
            if name in inside:
                continue
            key, owner = self.map.origins[name].keys[0], self.model.get_submodule(name.rpartition(".")[0])
            if owner not in by_row.get(key, []):  # a table that scales what is looked up has a tied head that does not
                self._set(name, replaced)
            elif key in self.weights.compressed or key in self._replaced or self.weights.copied(key):
                shape = self.model.get_parameter(name).shape
                set_parameter(self.model, name, torch.full((), torch.nan).expand(shape))  # nothing but rows is read
            else:
                set_parameter(self.model, name, self.weights.get(key))
        for name in self.map.absent:
            set_parameter(self.model, name, torch.zeros_like(self.model.get_parameter(name), device=self.device))
        self.model.tie_weights()
        rows: Callable[[Rows], Tensor]
        for key, modules in by_row.items():
            if key in self.weights.edits and key not in self.weights.compressed and key not in self._replaced:
                rows = modules[0].weight.detach().__getitem__  # changed once, not whenever rows are read
            else:
                rows = self._replaced.get(key) or self.weights.rows(key)
            for module in modules:
                forward = _lookup(rows) if isinstance(module, nn.Embedding) else _project(module, rows)
                setattr(module, "forward", forward)  # noqa: B010 - of this module alone
        for name, buffer in self.model.named_buffers():
            set_parameter(self.model, name, buffer.to(self.device))
        if left := [n for n, p in self.model.named_parameters() if p.is_meta and n not in inside]:
            raise InputError(f"{self.source.folder}: no tensor on disk for {', '.join(left[:3])}.")


class _Seen(Exception):  # noqa: N818 - control flow, never seen outside
    pass


def _lookup(rows: Callable[[Rows], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(ids: Tensor) -> Tensor:
        return rows(ids.flatten()).float().view(*ids.shape, -1)

    return forward


class _Product(torch.autograd.Function):
    """x W^T with rows of W that are read again on the way back: in float32 all of them may not fit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[], Tensor]) -> Tensor:
        ctx.read = read
        return nn.functional.linear(x, read())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.read(), None


def _project(module: nn.Linear, rows: Callable[[Rows], Tensor]) -> Callable[[Tensor], Tensor]:
    def read(stretch: slice) -> Tensor:
        return rows(stretch).float()

    def forward(x: Tensor) -> Tensor:
        stretches = (slice(start, start + HEAD_ROWS) for start in range(0, module.out_features, HEAD_ROWS))
        product: Callable[[Tensor, Callable[[], Tensor]], Tensor] = _Product.apply
        out = torch.cat([product(x, partial(read, stretch)) for stretch in stretches], dim=-1)
        return out if module.bias is None else out + module.bias

    return forward
