"""Steps of gradient by transformers' Trainer, with a loss that never holds the logits of all positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.plan.steps import LOGITS
from llmshrink.recipe.distill import LossSpec
from llmshrink.recipe.modes import PolicySpec
from llmshrink.train.chunks import summed
from llmshrink.train.data import averaged
from llmshrink.train.exits import Exits
from llmshrink.train.finite import check_number
from llmshrink.train.heads import Halves
from llmshrink.train.hidden import Likeness
from llmshrink.train.losses import mixed
from llmshrink.train.policy import Policy
from llmshrink.train.teachers import Teacher
from llmshrink.train.uld import Shared
from llmshrink.train.zeros import KeepingZeros

DIVERGENCE = LossSpec(name="kl", temperature=1.0, alpha=1.0)  # what is measured, whatever is made small, ...
TEXT = LossSpec(alpha=0.0)  # ... but by a teacher of another vocabulary


class Distiller(KeepingZeros):
    """Makes a student's distribution that of a teacher."""

    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    def __init__(
        self,
        *,
        teacher: Teacher | None,
        loss: LossSpec,
        hidden: Likeness | None = None,
        policy: PolicySpec | None = None,
        shared: Shared | None = None,
        exits: Sequence[int] = (),
        **given: Any,
    ) -> None:
        """Begin.

        Args:
            teacher: says what is right; None: the text alone does.
            loss: what is made small.
            hidden: draws states to those of the teacher, which then looks at the text in any case; None: none are.
            policy: how rows are continued by the student itself; None: none are.
            shared: of a teacher with another vocabulary, tokens that stand for the same text.
            exits: layers that learn to say what the last one says.
            given: as for Trainer, and `zeros`.
        """
        super().__init__(**given)
        self.model_accepts_loss_kwargs = True  # so that the tokens of a step are counted
        self._loss, self._teacher, self._shared = loss, teacher, shared
        self._held = TEXT if loss.name == "uld" else DIVERGENCE
        own = self.accelerator.unwrap_model(self.model)
        self._own, self._hidden = Halves(own), hidden
        self._policy = None if policy is None else Policy(own, policy, self.args.seed)
        self._exits = Exits(own, self._own, exits) if exits else None
        if hidden is not None and self.train_dataset is not None:
            hidden.fit(self._seen())

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of one step, some in the student's own words, and how many of their tokens count."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._policy is None or not batches:
            return batches, count
        first, rank = self.state.global_step * self.args.gradient_accumulation_steps, self.args.process_index
        batches = [self._policy.rows(self._prepare_inputs(batch), first + i, rank) for i, batch in enumerate(batches)]
        return batches, self._get_num_items_in_batch(batches, device)

    @torch.no_grad()
    def _seen(self) -> Iterator[Tensor]:
        """Which positions count of the first rows to learn from, once both models have been run on them."""
        assert self._hidden is not None and self._teacher is not None
        size = self.args.per_device_train_batch_size
        for start in range(0, len(self.train_dataset), size):
            rows = [self.train_dataset[i] for i in range(start, min(start + size, len(self.train_dataset)))]
            batch = self._prepare_inputs(self.data_collator(rows))
            labels = batch.pop("labels")
            with self._hidden.watching():
                self._own.body(self.model, batch)
                self._teacher.look(batch)
            yield labels[:, 1:] != -100

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, nats per token of the step; labels stand at their own tokens, as everywhere.

        Of a model that does not learn at the moment it is KL(teacher || student), whatever the loss is; surprise at
        the text, where both have other vocabularies; KL(last layer || exit), where there is no teacher but that.

        Raises:
            InputError: it is no number.
        """
        given = {key: value for key, value in inputs.items() if key not in ("labels", "drawn")}
        labels, spec = inputs["labels"][:, 1:], self._loss if model.training else self._held
        if inputs.get("drawn"):  # nothing is learned from one's own words being one's own
            spec = spec.model_copy(update={"alpha": 1.0})
        total = self._total(model, given, labels, spec)
        check_number(total, self.state.global_step, inputs)
        if model.training and num_items_in_batch is not None:  # of all processes, over which gradients are averaged
            loss = total * self.accelerator.num_processes / num_items_in_batch
        else:
            loss = total / averaged(labels, self.eval_dataset)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _total(self, model: nn.Module, given: dict[str, Any], labels: Tensor, spec: LossSpec) -> Tensor:
        """The loss of all positions but the last, which nothing follows; some positions at a time."""
        hidden, exits = (self._hidden, self._exits) if model.training or self._teacher is None else (None, None)
        teacher = self._teacher if spec.alpha > 0 or hidden is not None else None
        words, vocabulary, other = None, self._own.vocabulary, self._own.vocabulary
        with ExitStack() as watched:
            for each in (hidden, exits):
                if each is not None:
                    watched.enter_context(each.watching())
            state = self._own.body(model, given)[:, :-1]
            if teacher is not None:
                words = teacher.look(given)
                other = teacher.vocabulary
        limits = (vocabulary, other) if spec.name == "uld" else (min(vocabulary, other),) * 2  # the rest is padding

        def part(state: Tensor, span: slice) -> Tensor:
            logits = self._own.head(state)[..., : limits[0]].flatten(0, 1)
            wanted = None if words is None else words(span)
            if isinstance(wanted, Tensor):
                wanted = wanted[..., : limits[1]].flatten(0, 1)
            return mixed(logits, wanted, labels[:, span].flatten(), spec, self._shared)

        positions = max(1, LOGITS // (len(state) * max(limits) * 4))
        if exits is not None and not model.training:  # it is its own teacher
            return exits.loss(state, labels, spec, positions)
        total = summed(part, state, self._own.parameters, positions)
        if exits is not None:
            total = total + exits.loss(state, labels, spec, positions)
        return total if hidden is None else total + hidden.loss(labels != -100)
