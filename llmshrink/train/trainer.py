"""Steps of gradient by transformers' Trainer, with a loss that never holds the logits of all positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer

from llmshrink.errors import InputError
from llmshrink.recipe.distill import LossSpec
from llmshrink.train.heads import Halves
from llmshrink.train.losses import mixed

LOGITS = 64 << 20  # bytes of one model's logits at a time
DIVERGENCE = LossSpec(name="kl", temperature=1.0, alpha=1.0)  # what is measured, whatever is made small


class Distiller(Trainer):  # type: ignore[misc] # it has no types
    """Makes a student's distribution that of a teacher."""

    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    def __init__(self, *, teacher: PreTrainedModel | None, loss: LossSpec, **given: Any) -> None:
        """Begin.

        Args:
            teacher: says what is right, on the device of the student; None: the text alone does.
            loss: what is made small.
            given: as for Trainer.
        """
        super().__init__(**given)
        self.model_accepts_loss_kwargs = True  # so that the tokens of a step are counted
        self._loss, self._teacher = loss, teacher
        self._own = Halves(self.accelerator.unwrap_model(self.model))
        self._other = None if teacher is None else Halves(teacher)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, nats per token of the step; labels stand at their own tokens, as everywhere.

        Of a model that does not learn at the moment it is KL(teacher || student), whatever the loss is.

        Raises:
            InputError: it is no number.
        """
        given = {key: value for key, value in inputs.items() if key != "labels"}
        labels = inputs["labels"][:, 1:]
        spec = self._loss if model.training else DIVERGENCE
        own = self._own.body(model, given)[:, :-1]
        other = None
        if self._other is not None and self._teacher is not None and spec.alpha > 0:
            with torch.no_grad():
                other = self._other.body(self._teacher, given)[:, :-1]
        total = self._summed(own, other, labels, spec)
        if not math.isfinite(float(total.detach())):
            step, rows = self.state.global_step, inputs["input_ids"][:, :8].tolist()
            raise InputError(
                f"The loss of step {step} is no number; its rows begin with the tokens {rows}.",
                hint="Lower train.rate, or train.clip; the last saved state is kept.",
            )
        if num_items_in_batch is None or not model.training:
            num_items_in_batch = (labels != -100).sum()
        loss = total / num_items_in_batch
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _summed(self, own: Tensor, other: Tensor | None, labels: Tensor, spec: LossSpec) -> Tensor:
        """The loss of all positions, some at a time: their logits are made again on the way back."""
        vocabulary = self._own.vocabulary if self._other is None else min(self._own.vocabulary, self._other.vocabulary)
        positions = max(1, LOGITS // (len(own) * vocabulary * 4))
        total = own.new_zeros((), dtype=torch.float32)
        for start in range(0, own.shape[1], positions):
            part = slice(start, start + positions)
            taught = None if other is None else other[:, part]
            total = total + checkpoint(
                self._part, own[:, part], taught, labels[:, part], spec, vocabulary, use_reentrant=False
            )
        return total

    def _part(self, own: Tensor, other: Tensor | None, labels: Tensor, spec: LossSpec, vocabulary: int) -> Tensor:
        logits = self._own.head(own)[..., :vocabulary].flatten(0, 1)
        wanted = None
        if other is not None and self._other is not None:
            with torch.no_grad():
                wanted = self._other.head(other)[..., :vocabulary].flatten(0, 1)
        return mixed(logits, wanted, labels.flatten(), spec)
