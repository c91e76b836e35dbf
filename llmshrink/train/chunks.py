"""The loss of many positions with the logits of a few in memory, and its gradients in the same go.

Gradients of a stretch are made as soon as its loss is, so that nothing behind the body is run twice (the fused losses
of Liger Kernel do so for one linear, Hsu et al. 2024, arXiv 2410.10989); here the head is any function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Part = Callable[[Tensor, slice], Tensor]  # of states [rows, positions, hidden] and which positions they are: the loss


def summed(part: Part, state: Tensor, parameters: Sequence[nn.Parameter], positions: int) -> Tensor:
    """The sum of a loss over all positions.

    Args:
        part: the loss of some positions.
        state: what enters the head [rows, length, hidden].
        parameters: what learns within `part`.
        positions: how many are seen at a time.
    """
    if not torch.is_grad_enabled():
        return torch.stack([part(state[:, span], span) for span in _spans(state, positions)]).sum()
    found: Tensor = _Summed.apply(part, positions, state, *parameters)  # type: ignore[no-untyped-call]
    return found


def _spans(state: Tensor, positions: int) -> list[slice]:
    length = state.shape[1]
    return [slice(start, min(length, start + positions)) for start in range(0, length, positions)]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Part, positions: int, state: Tensor, *parameters: nn.Parameter) -> Tensor:
        total = state.new_zeros((), dtype=torch.float32)
        entering = torch.zeros_like(state)
        learning = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for span in _spans(state, positions):
            with torch.enable_grad():
                leaf = state[:, span].detach().requires_grad_()
                loss = part(leaf, span)
            first, *others = torch.autograd.grad(loss, [leaf, *parameters], allow_unused=True)
            entering[:, span] = first
            for gradient, other in zip(learning, others, strict=True):
                if other is not None:
                    gradient += other
            total += loss.detach()
        learned = (gradient.to(parameter.dtype) for gradient, parameter in zip(learning, parameters, strict=True))
        ctx.save_for_backward(entering, *learned)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        """`outer`: the gradient of the sum, a scalar."""
        return (None, None, *(gradient.mul_(outer[0]) for gradient in ctx.saved_tensors))
