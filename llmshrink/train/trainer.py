"""Steps of gradient by transformers' Trainer, with a loss that never holds the logits of all positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from llmshrink.plan.steps import LOGITS
from llmshrink.recipe.distill import LossSpec
from llmshrink.train.chunks import summed
from llmshrink.train.finite import check_number
from llmshrink.train.heads import Halves
from llmshrink.train.losses import mixed
from llmshrink.train.teachers import Teacher

DIVERGENCE = LossSpec(name="kl", temperature=1.0, alpha=1.0)  # what is measured, whatever is made small


class Distiller(Trainer):  # type: ignore[misc] # it has no types
    """Makes a student's distribution that of a teacher."""

    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    def __init__(self, *, teacher: Teacher | None, loss: LossSpec, **given: Any) -> None:
        """Begin.

        Args:
            teacher: says what is right; None: the text alone does.
            loss: what is made small.
            given: as for Trainer.
        """
        super().__init__(**given)
        self.model_accepts_loss_kwargs = True  # so that the tokens of a step are counted
        self._loss, self._teacher = loss, teacher
        self._own = Halves(self.accelerator.unwrap_model(self.model))

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
        check_number(total, self.state.global_step, inputs)
        if num_items_in_batch is None or not model.training:
            num_items_in_batch = (labels != -100).sum()
        loss = total / num_items_in_batch
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _total(self, model: nn.Module, given: dict[str, Any], labels: Tensor, spec: LossSpec) -> Tensor:
        """The loss of all positions but the last, which nothing follows; some positions at a time."""
        teacher = self._teacher if spec.alpha > 0 else None
        state, vocabulary = self._own.body(model, given)[:, :-1], self._own.vocabulary
        words = None
        if teacher is not None:
            words, vocabulary = teacher.look(given), min(vocabulary, teacher.vocabulary)

        def part(state: Tensor, span: slice) -> Tensor:
            logits = self._own.head(state)[..., :vocabulary].flatten(0, 1)
            wanted = None if words is None else words(span)[..., :vocabulary].flatten(0, 1)
            return mixed(logits, wanted, labels[:, span].flatten(), spec)

        positions = max(1, LOGITS // (len(state) * vocabulary * 4))
        return summed(part, state, self._own.parameters, positions)
