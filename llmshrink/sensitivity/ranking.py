"""What the parts of a block are worth: neurons, heads, channels in an order, the best first.

A neuron is one column of the linear that reads the inner channels of an MLP, a group of heads is a few columns of the
one that reads the heads. Criteria look at these columns w and at what they are multiplied by, x:

magnitude    |w|^2 and the same of all rows that make the channel; no text
activation   mean x^2 (after Muralidharan et al. 2024, Minitron, arXiv 2407.14679)
wanda        mean x^2 |w|^2 (Sun et al. 2024, arXiv 2306.11695, for a channel)
fluctuation  var x |w|^2 (An et al. 2024, FLAP, arXiv 2312.11983)
obs          what error is left without them once the other columns make up for it, w^T [H^-1]_pp^-1 w (Hassibi and
             Stork 1993; Frantar and Alistarh 2022, arXiv 2208.11580, section 3); the worst go first, a few at a time,
             and the rest is worth something else from then on

Gradients (`taylor.py`) and experts (`routed.py`) have modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 256  # in which all things but those that are kept anyway would go


def eliminated(hessian: Tensor, weight: Tensor, unit: int, left: int, damp: float) -> Tensor:
    """An order of things by optimal brain surgery.

    Args:
        hessian: mean of x x^T [in, in].
        weight: of the linear that reads them [out, in].
        unit: columns of one thing; they lie side by side.
        left: things at which to stop: the order of these is not looked for.
        damp: added to the diagonal, as a share of its mean.

    Returns:
        int64 [in / unit], the best first.
    """
    damped, left_over = (tensor.to(torch.float64, copy=True) for tensor in (hessian, weight))
    count = len(damped) // unit
    damped.diagonal().add_(damp * float(damped.diagonal().mean()) or 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    alive = torch.ones(count, dtype=torch.bool, device=inverse.device)
    gone: list[Tensor] = []
    while (there := int(alive.sum())) > left:
        losses = _losses(inverse, left_over, unit).masked_fill(~alive, torch.inf)
        some = losses.argsort(stable=True)[: min(max(1, count // ROUNDS), there - left)]
        columns = (some[:, None] * unit + torch.arange(unit, device=inverse.device)).flatten()
        within = torch.linalg.inv(inverse[columns][:, columns])
        left_over -= left_over[:, columns] @ within @ inverse[columns]
        inverse -= inverse[:, columns] @ (within @ inverse[columns])
        left_over[:, columns] = 0
        inverse[columns, columns] = 1  # whatever: they are out of the game
        alive[some] = False
        gone.append(some)
    best = _losses(inverse, left_over, unit).masked_fill(~alive, -torch.inf).argsort(descending=True, stable=True)
    return torch.cat([best[:there], *(some.flip(0) for some in reversed(gone))])


def _losses(inverse: Tensor, weight: Tensor, unit: int) -> Tensor:
    """What each thing alone would leave as an error [in / unit]."""
    if unit == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = len(inverse) // unit
    blocks = torch.stack([inverse[i * unit : (i + 1) * unit, i * unit : (i + 1) * unit] for i in range(count)])
    columns = weight.T.reshape(count, unit, -1)
    losses: Tensor = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
    return losses


def in_order(worth: Tensor) -> Tensor:
    """The order of things by what they are worth [things], best first."""
    return worth.argsort(descending=True, stable=True)


def of_things(scores: Tensor, unit: int) -> Tensor:
    """The order of things by the sums of their columns' scores [in]."""
    return in_order(scores.view(-1, unit).sum(1))


BY_COLUMN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "activation": lambda mean, square, weight: square,
    "wanda": lambda mean, square, weight: square * weight.square().sum(0),
    "fluctuation": lambda mean, square, weight: (square - mean.square()) * weight.square().sum(0),
}
"""Scores of columns [in] from the mean of x and of x^2 [in], and the weight [out, in]; all float32."""
