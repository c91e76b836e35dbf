"""Zeros of pruned matrices that stay while the other weights learn.

Nothing is added to the model. Before a step the gradient of a weight that is zero becomes zero, so that the norm that
gradients are cut to is that of the weights that learn; after it the weight becomes zero again. AdamW would leave it so,
as its averages of zeros are zero, but in 8 bits they are not. What is zero is seen in the weights themselves, so that
processes which share gradients, or weights, agree; where it was is remembered, a bit for each weight, for a proof.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from llmshrink.errors import GateError
from llmshrink.formats.bits import pack_mask, unpack_mask
from llmshrink.methods.sparsity import zeros_kept
from llmshrink.report.schema import ZerosReport


class KeepingZeros(Trainer):  # type: ignore[misc] # it has no types
    """A trainer under whose steps zeros stay."""

    def __init__(self, *, zeros: Zeros | None = None, **given: Any) -> None:
        """Begin; `zeros` None: all weights learn; `given` as for Trainer."""
        super().__init__(**given)
        self._zeros = zeros
        if zeros:
            self.add_callback(zeros)

    def training_step(self, *given: Any, **more: Any) -> Tensor:
        """The loss of a batch, with its gradients."""
        loss: Tensor = super().training_step(*given, **more)
        if self._zeros:
            self._zeros.hold(self.accelerator.unwrap_model(self.model))
        return loss


class Zeros(TrainerCallback):  # type: ignore[misc] # it has no types
    """Where the zeros of a model are that stay."""

    def __init__(self, model: nn.Module, names: Iterable[str], keep: Literal["auto"] | bool) -> None:
        """Look where they are.

        Args:
            model: before it learns, whole.
            names: of the parameters that may be pruned.
            keep: as of `zeros_kept`.
        """
        self._kept: dict[str, Tensor] = {}
        self._held: list[tuple[Tensor, Tensor]] = []  # weights in the middle of a step, and where they were zero
        for name in names:
            kept = zeros_kept(model.get_parameter(name).detach(), keep)
            if kept is not None:
                self._kept[name] = pack_mask(kept.cpu())

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._kept)

    def hold(self, model: nn.Module) -> None:
        """Take the gradients of zeros away: after they were made, before they are cut to a norm."""
        weights = [model.get_parameter(name) for name in self._kept]
        self._held = [(weight.detach(), weight.detach() == 0) for weight in weights]
        for weight, (_, zero) in zip(weights, self._held, strict=True):
            if weight.grad is not None:
                weight.grad.masked_fill_(zero, 0)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Whatever a step made of zeros, they are zero."""
        for weight, zero in self._held:
            weight.masked_fill_(zero, 0)
        self._held = []

    def report(self, model: nn.Module) -> list[ZerosReport]:
        """How many each matrix has.

        Raises:
            GateError: a weight is there again that was not.
        """
        found = []
        for name, packed in self._kept.items():
            weight = model.get_parameter(name).detach().cpu()
            kept = unpack_mask(packed, weight.numel()).view(weight.shape)
            if back := int(((weight != 0) & ~kept).sum()):
                raise GateError(f"{name}: {back} weights that were pruned are not zero any more.")
            before, after = (m.numel() - int(m.count_nonzero()) for m in (kept, weight))
            found.append(ZerosReport(name=name, weights=weight.numel(), before=before, after=after))
        return found
