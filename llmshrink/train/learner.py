"""Steps of gradient by transformers' Trainer with the loss of the model itself, of which only a part may learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from llmshrink.recipe.distill import LossSpec
from llmshrink.train.data import averaged
from llmshrink.train.finite import check_number
from llmshrink.train.losses import divergence
from llmshrink.train.zeros import KeepingZeros

AS_IT_IS = LossSpec(temperature=1.0)
LEARNED = "learned.safetensors"  # in a saved state


class Beside(Protocol):
    """What a method remembers between steps, beside what learns, and what it asks of that."""

    def pull(self) -> Tensor:
        """What is made small besides the loss, once in each step, and is no part of what is told of it, []."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All of it."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from it."""
        ...


class Learner(KeepingZeros):
    """Teaches a model a text.

    A saved state holds what learns and nothing else; of a model in shards it is what accelerate writes.
    """

    def __init__(
        self,
        *,
        beside: Beside | None = None,
        anchor: float = 0.0,
        classes: bool = False,
        **given: Any,
    ) -> None:
        """Begin.

        Args:
            beside: has a state of its own; None: nothing has.
            anchor: share of the loss that is the divergence from the model with its adapter off.
            classes: rows have one each.
            **given: as for Trainer, and `zeros`.
        """
        super().__init__(**given)
        self.model_accepts_loss_kwargs |= classes  # so that the rows of a step are counted
        self._beside, self._anchor, self._classes = beside, anchor, classes

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, nats per token of the step; of a model that does not learn that of the text alone.

        Raises:
            InputError: it is no number.
        """
        if model.training and not self._classes:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if self._anchor:
                gone = self._gone(inputs, outputs.logits, num_items_in_batch)
                loss = (1 - self._anchor) * loss + self._anchor * gone
        else:
            labels = inputs["labels"]
            logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
            if not self._classes:
                loss = surprise(logits, labels) / averaged(labels[:, 1:], self.eval_dataset)
            elif model.training and num_items_in_batch is not None:  # models of transformers divide by their own rows
                total = functional.cross_entropy(logits.float(), labels, reduction="sum")
                loss = total * self.accelerator.num_processes / num_items_in_batch
            else:
                loss = functional.cross_entropy(logits.float(), labels)
        if model.training and self._beside is not None:  # its gradients, and nothing of its size
            once = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            pull = self._beside.pull() / once  # what is not divided by that yet
            loss = loss + (pull - pull.detach())
        check_number(loss, self.state.global_step, inputs)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _gone(self, inputs: dict[str, Any], logits: Tensor, count: Tensor | int | None) -> Tensor:
        """KL(without adapter || with it) of a batch, nats per token of the step."""
        own = self.accelerator.unwrap_model(self.model)
        given, labels = {key: value for key, value in inputs.items() if key != "labels"}, inputs["labels"]
        own.eval()  # nothing is dropped out of what it said
        with torch.no_grad(), own.disable_adapter():
            before = own(**given).logits
        own.train()
        ends = [found[:, -labels.shape[1] : -1].flatten(0, 1) for found in (logits, before)]
        counted = (labels[:, 1:] != -100).flatten()
        total = (divergence(ends[0], ends[1], AS_IT_IS) * counted).sum()
        shared: Tensor = total / averaged(labels[:, 1:], None) if count is None else total / count
        return shared if count is None else shared * self.accelerator.num_processes

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what learns; shards are written with those of the optimizer."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"learned.{name}": p.detach().cpu().contiguous() for name, p in self._learns().items()}
        if self._beside is not None:
            state |= {f"beside.{name}": tensor.cpu() for name, tensor in self._beside.state().items()}
        save_file(state, folder / LEARNED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        state = load_file(Path(resume_from_checkpoint) / LEARNED)
        with torch.no_grad():
            for name, parameter in self._learns().items():
                parameter.copy_(state[f"learned.{name}"])
        if self._beside is not None:
            own = {name: tensor for name, tensor in state.items() if name.startswith("beside.")}
            self._beside.restore({name.removeprefix("beside."): tensor for name, tensor in own.items()})

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)

    def _learns(self) -> dict[str, nn.Parameter]:
        own = self.accelerator.unwrap_model(self.model)
        return {name: p for name, p in own.named_parameters() if p.requires_grad}


def surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy of the tokens that are labelled [rows, length], each at its own place, in float32.

    Logits [rows, virtual + length, vocabulary] may have more in front: what stands before the text.
    """
    ends = logits[:, -labels.shape[1] : -1].float().flatten(0, 1)
    return functional.cross_entropy(ends, labels[:, 1:].flatten(), reduction="sum")
