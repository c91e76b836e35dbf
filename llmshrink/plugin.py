"""Lets transformers load the formats that are llmshrink's own: imported by itself once transformers is.

A linear whose weight is stored in such a format becomes a `Packed` module: it holds what the file holds, and decodes
it whenever it is asked for its output, so that a model takes as much memory as its file and one layer. What several
matrices share is a tensor of one module, which the others look at. `dequantize()` makes plain linears of them, which
are faster and larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmshrink.formats import format_of
from llmshrink.formats.base import Slot
from llmshrink.formats.own import METHOD, OwnFormat
from llmshrink.forms import Form, applied, decode

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
        **_: Any,
    ) -> None:
        """`layers` says how each matrix is stored; `dequantize`: make plain linears while loading."""
        self.quant_method = METHOD
        self.format, self.format_version, self.layers = format, format_version, layers or {}
        self.dequantize = dequantize


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
        made = {}
        for name, entry in config["layers"].items():
            old = model.get_submodule(entry["module"])
            made[name] = Packed(name, entry, fmt, config, getattr(old, "bias", None))
            model.set_submodule(entry["module"], made[name])
        owners = {key: module for module in made.values() for key in module.stored}
        for module in made.values():
            module.borrow(owners)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.quantization_config.dequantize:
            self._dequantize(model)
        return model

    def _dequantize(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, Packed):
                model.set_submodule(name, module.plain(model.dtype))
        return model

    def is_serializable(self, **_: Any) -> bool:
        """What was loaded is saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Nothing of a packed weight is a parameter."""
        return False


class Packed(nn.Module):
    """A linear whose weight is held as it is stored.

    Attributes:
        name: Of the matrix on disk.
        in_features, out_features: As of nn.Linear.
        stored: Names on disk of its tensors -> its buffers.
        bias: [out], or None.
    """

    def __init__(
        self, name: str, entry: dict[str, Any], fmt: OwnFormat, config: dict[str, Any], bias: Tensor | None
    ) -> None:
        """A module for the matrix `name` (on disk), with buffers of the shapes that its `entry` says."""
        super().__init__()
        dtype = getattr(torch, entry["dtype"])
        self._slot = Slot(f"{name}.weight", entry["module"], tuple(entry["shape"]), dtype)
        self.name, self._format, self._config = name, fmt, config
        self.out_features, self.in_features = self._slot.shape
        layer = fmt.meta(entry)
        self.stored = {key: key.removeprefix(f"{name}.") for key in fmt.pack(self._slot, layer)}
        for key, tensor in fmt.pack(self._slot, layer).items():
            self.register_buffer(self.stored[key], torch.empty(tensor.shape, dtype=tensor.dtype))
        self._borrowed = list(fmt.borrowed(self._slot, layer))
        self._owners: dict[str, Packed] = {}  # no submodules of this one: their tensors are saved with them
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias), requires_grad=False)

    def borrow(self, owners: Mapping[str, Packed]) -> None:
        """Look at tensors of other modules, by their names on disk, where they are stored beside these.

        Raises:
            ValueError: nobody stores one.
        """
        if missing := [key for key in self._borrowed if key not in owners]:
            raise ValueError(f"{self._slot.key} shares {missing[0]}, which no matrix stores.")
        self._owners = {key: owners[key] for key in self._borrowed}

    def form(self) -> Form:
        """The weight as it is stored."""
        return self._format.unpack(self._slot, self._get, self._config)

    def _get(self, key: str) -> Tensor:
        if key in self.stored:
            return self.get_buffer(self.stored[key])
        owner = self._owners[key]
        return owner.get_buffer(owner.stored[key]).to(self.get_buffer("weight").device)  # the same tensor on one device

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return applied(self.form(), x, self.bias)

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """The same as a linear with a weight of its own."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(decode(self.form()).to(dtype), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    def extra_repr(self) -> str:
        """What it is."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self._format.name}"
