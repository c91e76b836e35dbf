"""A causal model in two parts, its body and its head, so that logits of all positions never are in memory at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput

from llmshrink.model.anatomy import block_list
from llmshrink.train.together import gather, unhooked


class Halves:
    """The body and the head of one model.

    Everything that a family does behind its blocks (a scale or a cap on logits, a bias) is its own code: the head runs
    the model's whole forward pass, with what the body gave out in the body's place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._blocks = list(block_list(model)[1])
        self._returns: int | None = None  # how long a tuple blocks return; None: a tensor
        self._body: nn.Module = model.get_decoder()
        inside = {id(module) for module in self._body.modules()}
        self._outside = [module for module in model.modules() if id(module) not in inside]
        self._kind: type[ModelOutput] = BaseModelOutputWithPast  # of what the body returns
        self._short = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def vocabulary(self) -> int:
        """Tokens that it has logits for."""
        size: int = self._model.config.get_text_config(decoder=True).vocab_size
        return size

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What learns of all that stands behind the body, which has been run; a tied embedding does so in both."""
        found = {id(p): p for module in self._outside for p in module.parameters(recurse=False) if p.requires_grad}
        return list(found.values())

    def body(self, call: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """What enters the head [rows, length, hidden].

        Args:
            call: the model, or what wraps it (DDP, FSDP): it is called itself, so that gradients are exchanged.
            inputs: of its forward pass.
        """
        seen: list[Tensor] = []

        def keep(_: nn.Module, __: Any, out: Any) -> None:
            seen.append(out[0])
            self._kind = type(out)

        def note(_: nn.Module, __: Any, out: Any) -> None:
            self._returns = None if isinstance(out, Tensor) else len(out)

        handles = [self._body.register_forward_hook(keep), self._blocks[-1].register_forward_hook(note)]
        try:
            call(**inputs, use_cache=False, **({"logits_to_keep": 1} if self._short else {}))
        finally:
            for handle in handles:
                handle.remove()
        gather(self._outside)
        return seen[0]

    @property
    def tail_parameters(self) -> list[nn.Parameter]:
        """What learns of all that stands in the body behind its blocks: its last norm."""
        inside = {id(module) for block in self._blocks for module in block.modules()}
        others = (m for m in self._body.modules() if id(m) not in inside and not isinstance(m, nn.Embedding))
        return [p for module in others for p in module.parameters(recurse=False) if p.requires_grad]

    def tail(self, state: Tensor) -> Tensor:
        """What the body would give out if this left its last block; it must have been run."""
        ids = torch.zeros(state.shape[:2], dtype=torch.long, device=state.device)
        out = state if self._returns is None else (state, *[None] * (self._returns - 1))
        with ExitStack() as passing:
            for block in self._blocks:
                passing.enter_context(_in_place_of(block, out))
            found: Tensor = self._body(input_ids=ids, use_cache=False)[0]
        return found

    def head(self, state: Tensor) -> Tensor:
        """Logits [rows, length, vocabulary] of what the body gave out; it must have been run."""
        ids = torch.zeros(state.shape[:2], dtype=torch.long, device=state.device)
        with _in_place_of(self._body, self._kind(last_hidden_state=state)), unhooked(self._outside):
            logits: Tensor = self._model.forward(input_ids=ids, use_cache=False).logits  # no hook of a wrapper
        return logits


@contextmanager
def _in_place_of(body: nn.Module, out: Any) -> Iterator[None]:
    def forward(*_: Any, **__: Any) -> Any:
        return out

    body.forward = forward
    try:
        yield
    finally:
        del body.forward
