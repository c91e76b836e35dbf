"""Steps of gradient by transformers' Trainer, with a loss that never holds the logits of all positions."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from llmshrink.errors import InputError
from llmshrink.plan.steps import LOGITS
from llmshrink.recipe.distill import LossSpec
from llmshrink.train.chunks import summed
from llmshrink.train.data import Part
from llmshrink.train.heads import Halves
from llmshrink.train.losses import mixed
from llmshrink.train.teachers import Teacher
from llmshrink.train.zeros import Zeros

DIVERGENCE = LossSpec(name="kl", temperature=1.0, alpha=1.0)  # what is measured, whatever is made small


class Distiller(Trainer):  # type: ignore[misc] # it has no types
    """Makes a student's distribution that of a teacher."""

    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    def __init__(self, *, teacher: Teacher | None, loss: LossSpec, zeros: Zeros | None = None, **given: Any) -> None:
        """Begin.

        Args:
            teacher: says what is right; None: the text alone does.
            loss: what is made small.
            zeros: weights that stay as they are; None: all learn.
            given: as for Trainer.
        """
        super().__init__(**given)
        self.model_accepts_loss_kwargs = True  # so that the tokens of a step are counted
        self._loss, self._teacher, self._zeros = loss, teacher, zeros
        if zeros:
            self.add_callback(zeros)
        self._own = Halves(self.accelerator.unwrap_model(self.model))

    def training_step(self, *given: Any, **more: Any) -> Tensor:
        """The loss of a batch, with its gradients."""
        loss: Tensor = super().training_step(*given, **more)
        if self._zeros:
            self._zeros.hold(self.accelerator.unwrap_model(self.model))
        return loss

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
        total = self._total(model, given, labels, self._loss if model.training else DIVERGENCE)
        if not math.isfinite(float(total.detach())):
            step, rows = self.state.global_step, inputs["input_ids"][:, :8].tolist()
            raise InputError(
                f"The loss of step {step} is no number; its rows begin with the tokens {rows}.",
                hint="Lower train.rate, or train.clip; the last saved state is kept.",
            )
        if model.training and num_items_in_batch is not None:  # of all processes, over which gradients are averaged
            loss = total * self.accelerator.num_processes / num_items_in_batch
        else:
            loss = total / self._measured(labels)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _measured(self, labels: Tensor) -> Tensor | float:
        """What a batch that is measured is divided by: Trainer's mean over rows is then one over tokens."""
        held = self.eval_dataset
        return len(labels) * held.counted / len(held) if isinstance(held, Part) else (labels != -100).sum()

    def _total(self, model: nn.Module, given: dict[str, Any], labels: Tensor, spec: LossSpec) -> Tensor:
        """The loss of all positions but the last, which nothing follows; some positions at a time."""
        teacher = self._teacher if spec.alpha > 0 else None
        state, vocabulary = self._own.body(model, given)[:, :-1], self._own.vocabulary
        words = None
        if teacher is not None:
            words, vocabulary = teacher.look(given), min(vocabulary, teacher.vocabulary)

        def part(state: Tensor, span: slice) -> Tensor:
            logits = self._own.head(state)[..., :vocabulary].flatten(0, 1)
            wanted = None if words is None else words(span)
            if isinstance(wanted, Tensor):
                wanted = wanted[..., :vocabulary].flatten(0, 1)
            return mixed(logits, wanted, labels[:, span].flatten(), spec)

        positions = max(1, LOGITS // (len(state) * vocabulary * 4))
        return summed(part, state, self._own.parameters, positions)
