"""What experts are worth: the mean size of what each adds, over the tokens that its router hands it.

mean over these tokens of g |f(x)|, with g the router's weight (Lasby et al. 2025, REAP, arXiv 2510.13999).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.engine.hidden import Hidden
from llmshrink.model.anatomy import Block
from llmshrink.model.streamed import StreamedModel


@torch.no_grad()
def routed(model: StreamedModel, block: Block, hidden: Hidden, experts: int) -> tuple[Tensor, Tensor]:
    """The worth of each expert of a loaded block, and the tokens that reach it: [experts], float64."""
    total, count = (torch.zeros(experts, dtype=torch.float64, device=model.device) for _ in range(2))

    def witness(expert: int, added: Tensor) -> None:
        total[expert] += added.double().norm(dim=-1).sum()
        count[expert] += len(added)

    fused = [m for m in model.model.get_submodule(block.prefix).modules() if hasattr(m, "is_transposed")]
    for module in fused:
        module.witness = witness
    try:
        for batch in range(len(hidden.batches)):
            hidden.run(block.index, batch)
    finally:
        for module in fused:
            del module.witness
    return total / count.clamp(min=1), count
