"""How much anonymous memory a run takes at its peak: known before it starts.

Everything that grows is bounded by one block, its statistics and the hidden states; depth does not appear. The factors
below count the matrices that are alive at one time; `bench/memory.py` compares what they add up to with what is used.
"""

from __future__ import annotations

from llmshrink.engine.compress import STACK, is_small
from llmshrink.engine.lanes import lanes_of
from llmshrink.model.anatomy import Block
from llmshrink.model.streamed import HEAD_ROWS, LOGITS, StreamedModel
from llmshrink.plan.work import Work
from llmshrink.statistics import Hessian

FIXED = 36 << 20  # the model's own classes, buffers of the libraries, the journal
FLOAT = 4
SWEEP = 9  # float32 copies of what is compressed in one call
PANELS = 8 / 2 + 4 / 2  # bytes per element of a Hessian: half a matrix in float64, half the result in float32


def planned_memory(work: Work, *, rows: int, batch_tokens: int, subset: bool) -> int:
    """Bytes of the compress step above the level after the imports.

    Args:
        work: what is done to which matrix.
        rows: calibration rows, each of `work.length` tokens.
        batch_tokens: tokens of one forward pass.
        subset: whether only one stretch of a block is calibrated at a time.
    """
    tokens = rows * work.length if work.needs_data else 0
    states = tokens * work.model.hidden * FLOAT
    batch = min(max(batch_tokens, work.length), tokens or work.length)
    return FIXED + states + max(_block(work, block, batch, subset) for block in work.model.anatomy.blocks)


def planned_evaluation(model: StreamedModel, *, rows: int, length: int, batch_tokens: int) -> int:
    """Bytes of scoring a text of `rows` x `length` tokens: the states of both models, a block, some logits.

    Args:
        model: the original.
        rows: of the longest text.
        length: of a row.
        batch_tokens: tokens of one forward pass.
    """
    states = 2 * rows * length * model.hidden * FLOAT
    batch = min(max(batch_tokens, length), rows * length)
    head = min(HEAD_ROWS, model.width) * model.hidden * FLOAT
    block = max(_weights(model, b) + _forward(model, b, batch) for b in model.anatomy.blocks)
    return FIXED + states + max(block, 4 * min(LOGITS, batch * model.width * FLOAT) + head)


def _block(work: Work, block: Block, batch: int, subset: bool) -> int:
    """The largest of its phases: all inputs gathered, one group after another compressed, the way to the next block."""
    loaded = _weights(work.model, block) + _forward(work.model, block, batch)
    packed = sum(t.numel() * t.itemsize for t in work.meta_tensors(block).values())
    sizes = {group: work.needs(group).bytes(group.width) for group in block.groups}
    kept = max(sizes.values(), default=0) if subset else sum(sizes.values())
    phases = [loaded + kept] if kept else []
    for group in block.groups:
        methods = [work.methods[m] for m in group.matrices if m in work.methods]
        if not methods:
            continue
        factors = int(PANELS * sizes[group] / FLOAT) if work.needs(group) is Hessian else 0
        matrices = [m.numel for m in group.matrices]
        sweep = SWEEP * FLOAT * (min(sum(matrices), STACK) if all(m.by_row for m in methods) else max(matrices))
        together = lanes_of(work.model.device) if is_small(group) else 1
        phases.append(kept + together * max(factors, factors // 3 + sweep))
        kept -= 0 if subset else sizes[group]
    decoded = max((m.numel for m in block.matrices), default=0) * FLOAT
    return packed + max([*phases, loaded + decoded])


def _weights(model: StreamedModel, block: Block) -> int:
    return sum(model.weights.infos[key].numel for key in block.keys) * FLOAT


def _forward(model: StreamedModel, block: Block, batch: int) -> int:
    widest = max((max(m.shape) for m in block.matrices), default=0)
    return lanes_of(model.device) * batch * (6 * model.hidden + 5 * widest) * FLOAT
