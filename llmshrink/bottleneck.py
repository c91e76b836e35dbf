"""Bottleneck adapters: a narrow MLP behind each part of a block, which adds what it learned to what the part gives out.

Behind attention and MLP (Houlsby et al. 2019, arXiv 1902.00751, section 2.1), or behind the MLP alone (Pfeiffer et al.
2021, arXiv 2005.00247). peft has none. A folder of one is read by

    model = BottleneckModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmshrink.errors import InputError

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
KIND = "bottleneck"  # as its settings say; peft knows no such type and refuses it


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))) of states [..., hidden]; at first nothing is added."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Its output, in the dtype of what comes in."""
        inner: Tensor = self.up(functional.gelu(self.down(x.to(self.down.weight.dtype))))
        return x + inner.to(x.dtype)


class BottleneckModel(nn.Module):
    """A model with bottlenecks behind some of its linears; what it does not know itself is the model's."""

    accepts_loss_kwargs = True  # as models of transformers do

    def __init__(self, base: PreTrainedModel, places: list[str], width: int) -> None:
        """Put them there; nothing but them learns.

        Args:
            base: the model.
            places: names of linears, each behind which one stands.
            width: of their inner states.
        """
        super().__init__()
        self.base = base.requires_grad_(False)
        self.places, self.width, self._enabled = places, width, True
        device = next(base.parameters()).device
        hidden = base.config.get_text_config(decoder=True).hidden_size
        self.bottlenecks = nn.ModuleList([Bottleneck(hidden, width) for _ in places]).to(device)
        for place, own in zip(places, self.bottlenecks, strict=True):
            base.get_submodule(place).register_forward_hook(self._follow(own))

    def _follow(self, own: nn.Module) -> Any:
        def follow(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            return own(out) if self._enabled else out

        return follow

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **given: Any) -> Any:
        """The model's own."""
        return self.base(input_ids=input_ids, labels=labels, **given)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is as it was."""
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True

    def save_pretrained(self, folder: Path, base: str) -> None:
        """Write what learned, and beside it settings that name its base."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            f"{place}.{name}": tensor.detach().cpu().contiguous()
            for place, own in zip(self.places, self.bottlenecks, strict=True)
            for name, tensor in own.state_dict().items()
        }
        save_file(state, folder / WEIGHTS)
        said = {"adapter_type": KIND, "base_model_name_or_path": base, "places": self.places, "width": self.width}
        (folder / SETTINGS).write_text(json.dumps(said, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, base: PreTrainedModel, folder: str | Path) -> Self:
        """A model with what lies in a folder.

        Raises:
            InputError: the folder holds no bottlenecks, or not those of this model.
        """
        folder = Path(folder)
        said, state = json.loads((folder / SETTINGS).read_bytes()), load_file(folder / WEIGHTS)
        if said.get("adapter_type") != KIND:
            raise InputError(f"{folder} holds another kind of adapter: peft loads it.")
        there = {name for name, _ in base.named_modules()}
        if absent := [place for place in said["places"] if place not in there]:
            raise InputError(f"{folder} is for another model: {type(base).__name__} has no {absent[0]}.")
        model = cls(base, said["places"], said["width"])
        try:
            for place, own in zip(model.places, model.bottlenecks, strict=True):
                prefix = f"{place}."
                own.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        except RuntimeError as error:
            raise InputError(f"{folder} does not fit {type(base).__name__}: {error}") from error
        return model


def is_bottleneck(folder: Path) -> bool:
    """Whether an adapter folder holds this kind."""
    return bool(json.loads((folder / SETTINGS).read_bytes()).get("adapter_type") == KIND)


__all__ = ["BottleneckModel", "is_bottleneck"]
