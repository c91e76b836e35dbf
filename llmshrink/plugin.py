"""Lets transformers load the formats that are llmshrink's own: imported by itself once transformers is.

A linear whose weight is stored in such a format becomes a `Packed` module: it holds what the file holds, and decodes
it whenever it is asked for its output, so that a model takes as much memory as its file and one layer. Of a packed
embedding the rows of the tokens asked for are decoded, a large head a stretch of rows at a time; a head that is tied to
the embedding looks at the embedding's buffers, and what several matrices share is a tensor of one module, at which the
others look. Codes that are entropy-coded in the file are so no more once they are loaded, nor when they are saved
again. `dequantize()` makes plain modules of them, which are faster and larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmshrink.formats import format_of
from llmshrink.formats.base import Slot
from llmshrink.formats.own import METHOD, VERSION, OwnFormat, packed_bytes
from llmshrink.forms import Form, applied, decode

STRETCH = 1 << 19  # weights that are decoded at a time; on a GPU so many more, as each stretch takes a start:
WIDER = 32

if TYPE_CHECKING:  # it is only being imported when this module is
    from transformers import PreTrainedModel


@register_quantization_config(METHOD)
class LlmshrinkConfig(QuantizationConfigMixin):  # type: ignore[misc] # transformers is not typed
    """The `quantization_config` of a checkpoint in one of llmshrink's own formats."""

    def __init__(
        self,
        format: str = "sparse",  # noqa: A002 - a key of config.json
        format_version: int = 1,
        layers: dict[str, dict[str, Any]] | None = None,
        dequantize: bool = False,
        packed: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Take the settings of a checkpoint.

        Args:
            format: its name.
            format_version: which way of writing it.
            layers: how each matrix is stored.
            dequantize: make plain linears while loading.
            packed: of which tensors the codes are entropy-coded; None: of none.
        """
        self.quant_method = METHOD
        self.format, self.format_version, self.layers = format, format_version, layers or {}
        self.dequantize, self.packed = dequantize, packed


@register_quantizer(METHOD)
class LlmshrinkQuantizer(HfQuantizer):  # type: ignore[misc] # the same
    """Puts `Packed` modules where the settings say that a linear is stored in a format of llmshrink's."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config.to_dict()
        fmt = format_of(config)
        why = fmt.cannot_read(config) if isinstance(fmt, OwnFormat) else "it is not known"
        if why or not isinstance(fmt, OwnFormat):
            raise ValueError(f"This llmshrink cannot read the format {config.get('format')!r}: {why}.")
        made = dict[str, Packed]()
        for name, entry in config["layers"].items():
            old = model.get_submodule(entry["module"])
            kind = PackedEmbedding if isinstance(old, nn.Embedding) else Packed
            made[name] = kind(name, entry, fmt, config, old)
            model.set_submodule(entry["module"], made[name])
            _tie(model, entry["module"], made[name])
        owners = {key: module for module in made.values() for key in module.stored}
        for module in made.values():
            module.borrow(owners)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.quantization_config.packed is not None:
            for module in model.modules():
                if isinstance(module, Packed):
                    module.open()
            self.quantization_config.packed, self.quantization_config.format_version = None, VERSION
        if self.quantization_config.dequantize:
            self._dequantize(model)
        return model

    def _dequantize(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        heads = [(name, module) for name, module in model.named_modules() if isinstance(module, TiedHead)]
        for name, module in list(model.named_modules()):
            if isinstance(module, Packed):
                model.set_submodule(name, module.plain(model.dtype))
        for name, head in heads:
            model.set_submodule(name, head.plain(model.dtype))
        if heads:  # the class says what is tied
            del model._tied_weights_keys
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
            model.tie_weights()
        return model

    def is_serializable(self, **_: Any) -> bool:
        """What was loaded is saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Nothing of a packed weight is a parameter."""
        return False


def _tie(model: PreTrainedModel, name: str, packed: Packed) -> None:
    """Let the heads that are tied to what was the module `name` look at what it holds now.

    They have no tensor of their own, so nothing is missed when the model is loaded, written twice when it is saved, or
    apart once it is moved.
    """
    tied: dict[str, str] = model.all_tied_weights_keys
    heads = [target for target, source in tied.items() if source == f"{name}.weight"]
    for head in (target.removesuffix(".weight") for target in heads):
        model.set_submodule(head, TiedHead(packed, model.get_submodule(head).bias))
    if heads:
        model.all_tied_weights_keys = {target: source for target, source in tied.items() if target not in heads}
        model._tied_weights_keys = dict(model.all_tied_weights_keys)


class Packed(nn.Module):
    """A linear whose weight is held as it is stored.

    Attributes:
        name: Of the matrix on disk.
        in_features, out_features: As of nn.Linear.
        stored: Names on disk of its tensors -> its buffers.
        bias: [out], or None.
    """

    def __init__(
        self, name: str, entry: dict[str, Any], fmt: OwnFormat, config: dict[str, Any], old: nn.Module
    ) -> None:
        """In place of `old`, a module for the matrix `name` (on disk): with buffers of the shapes its `entry` says."""
        super().__init__()
        dtype = getattr(torch, entry["dtype"])
        self._slot = Slot(f"{name}.weight", entry["module"], tuple(entry["shape"]), dtype)
        self.name, self._entry, self._format, self._config = name, entry, fmt, config
        self.out_features, self.in_features = self._slot.shape
        layer = fmt.meta(entry)
        tensors = fmt.pack(self._slot, layer)
        self.stored = {key: key.removeprefix(f"{name}.") for key in tensors}
        sizes = packed_bytes(config)
        self._packed = [key for key in self.stored if key in sizes]
        for key, tensor in tensors.items():
            shape = (int(sizes[key]),) if key in sizes else tensor.shape
            self.register_buffer(self.stored[key], torch.empty(shape, dtype=tensor.dtype))
        self._borrowed = list(fmt.borrowed(self._slot, layer))
        self._owners: dict[str, Packed] = {}  # no submodules of this one: their tensors are saved with them
        bias = getattr(old, "bias", None)
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias), requires_grad=False)

    def open(self) -> None:
        """Make plain codes of those that came entropy-coded, once and for all."""
        for key in self._packed:
            tensor = self.get_buffer(self.stored[key])
            if tensor.is_meta:
                raise ValueError(f"{key} is entropy-coded, and such codes cannot stay on disk: load it into memory.")
            setattr(self, self.stored[key], self._format.opened(key, tensor, self._config))
        self._config, self._packed = {**self._config, "packed": None}, []

    def borrow(self, owners: Mapping[str, Packed]) -> None:
        """Look at tensors of other modules, by their names on disk, where they are stored beside these.

        Raises:
            ValueError: nobody stores one.
        """
        if missing := [key for key in self._borrowed if key not in owners]:
            raise ValueError(f"{self._slot.key} shares {missing[0]}, which no matrix stores.")
        self._owners = {key: owners[key] for key in self._borrowed}

    def _get(self, key: str) -> Tensor:
        """A stored tensor by its name on disk."""
        if key in self.stored:
            return self.get_buffer(self.stored[key])
        owner = self._owners[key]
        return owner.get_buffer(owner.stored[key]).to(self.get_buffer("weight").device)  # the same tensor on one device

    def form(self) -> Form:
        """The weight as it is stored."""
        return self._format.unpack(self._slot, self._get, self._config)

    def rows(self, numbers: Tensor) -> Form:
        """Some rows of the weight, by their numbers, int64 [n]."""
        return self._format.read_rows(self._slot.key, self._entry, self._get, numbers)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.in_stretches(x, self.bias)

    def in_stretches(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out], a stretch of the outputs at a time."""
        out, width = self._slot.shape
        if out * width <= STRETCH or not self._format.reads_rows or self._format.factored(self._entry):
            return applied(self.form(), x, bias)
        whole = x.new_empty(*x.shape[:-1], out)
        step = max(1, STRETCH * (1 if x.device.type == "cpu" else WIDER) // width)
        for start in range(0, out, step):
            stop = min(start + step, out)
            whole[..., start:stop] = applied(self.rows(torch.arange(start, stop, device=x.device)), x)
        return whole if bias is None else whole.add_(bias)

    def weight_in(self, dtype: torch.dtype) -> nn.Parameter:
        """The whole matrix [out, in], decoded."""
        return nn.Parameter(decode(self.form()).to(dtype), requires_grad=False)

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """The same as a module with a weight of its own."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.weight_in(dtype)
        linear.register_parameter("bias", self.bias)
        return linear

    def extra_repr(self) -> str:
        """What it is."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self._format.name}"


class PackedEmbedding(Packed):
    """A table of vectors, of which those that are asked for are decoded.

    Attributes:
        table: The module that this one stands for, with a table of no rows: it gets the rows that a call needs, and
            does with them what its class does (Gemma's scales them). Its dtype is what they are given out in.
    """

    def __init__(
        self, name: str, entry: dict[str, Any], fmt: OwnFormat, config: dict[str, Any], old: nn.Module
    ) -> None:
        """As of `Packed`."""
        super().__init__(name, entry, fmt, config, old)
        assert isinstance(old, nn.Embedding)
        empty = torch.empty(0, self.in_features, dtype=old.weight.dtype, device=old.weight.device)
        del old.weight
        old.register_buffer("weight", empty, persistent=False)
        old.padding_idx = None  # of no meaning where no gradient reaches it, and not among a call's rows
        self.table = old

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> [..., width]."""
        numbers, places = torch.unique(ids, return_inverse=True)
        if not len(numbers):
            return self.table.weight.new_empty(*ids.shape, self.in_features)
        if not 0 <= int(numbers[0]) <= int(numbers[-1]) < self.out_features:
            raise IndexError(f"ids {int(numbers[0])} to {int(numbers[-1])} are not among {self.out_features} rows")
        table = copy(self.table)  # another object: other threads may ask for other rows
        table.__dict__["weight"] = decode(self.rows(numbers)).to(self.table.weight.dtype)
        found: Tensor = type(table).forward(table, places)  # not what hooks put there, which is of the empty one
        return found

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """The same as a module with a weight of its own."""
        module = self.table
        del module.weight
        module.weight = self.weight_in(dtype)
        return module


class TiedHead(nn.Module):
    """A head whose weight is that of the embedding."""

    def __init__(self, table: Packed, bias: nn.Parameter | None) -> None:
        """`table` is no part of it: it is moved and saved where it stands."""
        super().__init__()
        self._table = (table,)  # a module in a tuple is not registered
        self.in_features, self.out_features = table.in_features, table.out_features
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., tokens]."""
        table = self._table[0]
        found = table.in_stretches(x.to(table.get_buffer("weight").device), None).to(x.device)
        return found if self.bias is None else found.add_(self.bias)

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """A linear, whose weight is tied later."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=dtype)
        linear.register_parameter("bias", self.bias)
        return linear
