"""How much anonymous memory the compress step takes at its peak: known before it starts.

Everything that grows is bounded by one block, its statistics and the hidden states; depth does not appear.
"""

from __future__ import annotations

from llmshrink.model.anatomy import Block
from llmshrink.plan import Work

FIXED = 48 << 20  # the skeleton, the model's own classes, buffers of the libraries
FLOAT = 4


def planned_memory(work: Work, *, rows: int, batch_tokens: int, subset: bool) -> int:
    """Bytes above the level after the imports.

    Args:
        work: what is done to which matrix.
        rows: calibration rows, each of `work.length` tokens.
        batch_tokens: tokens of one forward pass.
        subset: whether only one stretch of a block is calibrated at a time.
    """
    model = work.model
    width: int = model.model.get_input_embeddings().weight.shape[1]
    tokens = rows * work.length if work.needs_data else 0
    # While one set of states is written to disk the next is computed.
    states = 2 * tokens * width * FLOAT
    worst = max(
        _block(work, block, min(batch_tokens, tokens) or work.length, width, subset) for block in model.anatomy.blocks
    )
    return FIXED + states + worst


def _block(work: Work, block: Block, batch: int, hidden: int, subset: bool) -> int:
    weights = sum(work.model.weights.infos[key].numel for key in block.keys) * FLOAT
    methods = [(g, next((work.methods[m] for m in g.matrices if m in work.methods), None)) for g in block.groups]
    kept = [method.needs.bytes(group.width) for group, method in methods if method is not None]
    statistics = max(kept, default=0) if subset else sum(kept)
    widest = max((m.shape[0] for m in block.matrices), default=hidden)
    forward = batch * (6 * hidden + 3 * widest) * FLOAT
    # The factorisation works in float64 on three copies; the search and the sweep on a few copies of a matrix.
    factor = max(
        (3 * 8 * g.width**2 for g, m in methods if m is not None and m.needs.bytes(g.width) > g.width * FLOAT),
        default=0,
    )
    sweep = max((6 * m.numel * FLOAT for m in block.matrices if m in work.methods), default=0)
    return weights + statistics + max(forward, factor, sweep)
