"""How much anonymous memory a run takes at its peak: known before it starts.

Everything that grows is bounded by one block, its statistics and the hidden states; depth does not appear. The factors
below count the matrices that are alive at one time; `bench/memory.py` compares what they add up to with what is used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

from llmshrink import ranks
from llmshrink.engine.groups import STACK, is_small
from llmshrink.engine.lanes import lanes_of
from llmshrink.engine.slopes import together, weighed
from llmshrink.engine.tune import HELD
from llmshrink.forms import Codebook, Sum
from llmshrink.memory import TRIM, free_memory
from llmshrink.methods import basis
from llmshrink.methods.base import FLOAT, SWEEP
from llmshrink.model.anatomy import Block, Group, Matrix, Part
from llmshrink.model.streamed import HEAD_ROWS, StreamedModel
from llmshrink.plan.adapting import Adapting
from llmshrink.plan.cache import SHARD
from llmshrink.plan.choices import Choices
from llmshrink.plan.cut import Cuts
from llmshrink.plan.economy import Economy, choose, passes
from llmshrink.plan.ratios import Ratios
from llmshrink.plan.steps import LOGITS
from llmshrink.plan.training import Training
from llmshrink.plan.work import Work
from llmshrink.recipe.schema import Recipe, RunSpec
from llmshrink.statistics import Cross, Hessian, Norm

LIBRARIES = 320 << 20  # what Python and the imports hold before anything is done; each reader has its own
FIXED = (36 << 20) + TRIM  # the model's own classes, buffers of the libraries, the journal; holes in the heap
TWIN = 32 << 20  # a second model of the same shape, of which one block at a time is in memory
LEARNING = 9  # copies of what is learned: latents, their gradients and averages of these, weights and their gradients
TABLED = 2  # more of what is learned as codes into tables: latents in units of a row's scale, codes of 64 bits
LENT = 5  # float32 copies of a block that is tuned: codes in steps, weights, their gradients, one that is being made
TUNED = 5  # copies of what is tuned: moves, their gradients and averages of these, what is written
SAVED = 8  # of the same on disk: an older and a newer file of moves and averages, and what is written
DRAWN = 4  # stretches of logits: as they are, as chances and as sums of these, and one that is being made
COMPARED = 6  # stretches of logits: both models', both as logarithms, their difference
FITTING = 1 + 2 * 2  # sums over most rows and over others, and copies in float64 while they are solved
RANKING = 2 * 4  # float64 copies of a Hessian in float32, while columns are eliminated
LOGIT_COPIES = 8  # while a loss is found, on the way there and back
LOGITS_WHOLE = 4  # copies of all logits: as they are, in float32, as logarithms, and their gradients
FOUR_BITS = 0.57  # bytes for a weight in NF4, with its scales
ROUNDING = 6  # float32 copies of a matrix while its gradients pass through its rounding
LEARNED = 2 * (
    4 + 2
)  # of scales and zero points: what is learned, gradients, averages of these, the start, what is stored
SHORT = 256  # tokens of a row on which candidates are compared
WEIGHED = 4  # float32 copies of a matrix of which outliers or magnitudes are counted
PACKING = 3  # bytes per weight while codes become bytes of a file
SOLVING = 3 * 2 + 1  # float32 matrices while targets are solved for: three in float64, and one
PANELS = 8 / 2 + 4 / 2  # bytes per element of a Hessian: half a matrix in float64, half the result in float32


def compress_economy(
    work: Work, recipe: Recipe, choices: Choices | Cuts | Ratios | Training | Adapting | None = None
) -> tuple[Economy, int]:
    """What keeps the compress step within the memory there is, or takes least of it; and the bytes it needs.

    Where layers' settings are chosen by measuring before it, that is done with the same economy.
    """
    rows = recipe.calibration.samples

    def needed(economy: Economy) -> int:
        compressing = planned_memory(work, economy, rows=rows, subset=recipe.run.sequential == "subset")
        if isinstance(choices, Cuts):
            return max(compressing, planned_search(choices, work, economy, rows=rows))
        if isinstance(choices, Training):
            return max(compressing, planned_training(choices))
        if isinstance(choices, Adapting):
            return max(compressing, planned_adapting(choices))
        if isinstance(choices, Ratios):
            return max(compressing, planned_ratios(choices, economy, rows=rows))
        return compressing if choices is None else max(compressing, planned_measuring(choices, economy, rows=rows))

    return _choose(needed, work.model, recipe.run, work.length, statistics_bytes(work))


def planned_training(training: Training) -> int:
    """Bytes of a training: the student with gradients and what AdamW remembers, its teacher, and a batch on its way.

    Each process on this machine holds all that, and libraries of its own. Where what the teacher says is written down
    before, one block of it at a time is in memory, in one of them.
    """
    student, spec = training.guess.model, training.stage.train
    beside = 0 if training.keeping is not None else teacher_parameters(training)
    weights = FLOAT * (4 * student.parameters + beside + rounded_numbers(training))
    tokens = spec.batch * training.steps.length
    blocks = student.anatomy.blocks
    kept = sum(_learning(student, block, tokens) for block in blocks)
    zeros = 0 if spec.keep_zeros is False else sum(matrix.numel for block in blocks for matrix in block.matrices)
    more = _drawing(training, tokens) + _exits(training, tokens)
    learning = _of_all(FIXED + weights + kept + zeros + more + LOGIT_COPIES * LOGITS)
    if training.streamed is None:
        return learning
    return max(learning, planned_caching(training.streamed, training.steps.length))


def planned_caching(teacher: StreamedModel, length: int) -> int:
    """Bytes of writing down what a teacher says of rows: states of a shard, and a block or a stretch of logits."""
    batch = max(length, teacher.batch_tokens(None))
    states = max(SHARD, length) * teacher.hidden * FLOAT
    head = min(HEAD_ROWS, teacher.width) * teacher.hidden * FLOAT
    block = max(_weights(teacher, b) + _forward(teacher, b, batch) for b in teacher.anatomy.blocks)
    return FIXED + TWIN + states + max(block, LOGITS + head)


def _exits(training: Training, tokens: int) -> int:
    """States of the exits and their gradients, and those of the head."""
    student, exits = training.guess.model, training.stage.exits or ()
    return FLOAT * student.hidden * (2 * len(exits) * tokens + (student.vocabulary if exits else 0))


def _drawing(training: Training, tokens: int) -> int:
    """States of the teacher beside the student's, and what projects these, with gradients and averages."""
    pairs = len(training.pairs(None))
    if not pairs:
        return 0
    own, other = training.widths
    return FLOAT * pairs * (tokens * (own + 2 * other) + 4 * own * other)


def planned_adapting(adapting: Adapting) -> int:
    """Bytes of learning an adapter: the model, what AdamW remembers of the numbers that learn, a batch on its way.

    The loss is the model's own, so logits of all positions are there, and their gradients. Each process on this machine
    holds all that.
    """
    model, spec = adapting.model, adapting.stage.train
    tokens = spec.batch * adapting.steps.length
    weights = FLOAT * model.parameters
    if adapting.in_four_bits:  # read in full, a tensor at a time
        inside = sum(m.numel for block in model.anatomy.blocks for m in block.matrices)
        weights -= int((FLOAT - FOUR_BITS) * inside)
    learning = FLOAT * 4 * adapting.size.learns
    kept = sum(_learning(model, block, tokens) for block in model.anatomy.blocks)
    copies = LOGITS_WHOLE * (2 if adapting.stage.anchor else 1)  # those of the model as it was, too
    return _of_all(FIXED + weights + learning + kept + copies * FLOAT * tokens * model.vocabulary)


def _of_all(each: int) -> int:
    """Bytes of the processes on this machine that train together."""
    return each * ranks.here() + LIBRARIES * (ranks.here() - 1)


def adapted_evaluation(adapting: Adapting, length: int) -> int:
    """Bytes of scoring a row of so many tokens with the adapter and without it, the model whole in memory."""
    model = adapting.model
    logits = 2 * LOGITS_WHOLE * FLOAT * length * model.vocabulary
    return LIBRARIES + FIXED + FLOAT * (model.parameters + adapting.size.learns) + logits


def rounded_numbers(training: Training) -> int:
    """What training through rounding has beside the weights: all as they are rounded, one while it is, and tables."""
    work = training.guess
    if training.stage.qat is None:
        return 0
    tables = sum(math.prod(shape) for shape in work.scale_shapes.values())
    return sum(m.numel for m in work.methods) + ROUNDING * max(m.numel for m in work.methods) + LEARNED * tables


def teacher_parameters(training: Training) -> int:
    """Weights of the teacher; none, where it is the model's own last layer."""
    if training.stage.alone or training.teacher is None:
        return 0
    return sum(info.numel for info in training.teacher.checkpoint.infos.values())


def evaluation_economy(model: StreamedModel, recipe: Recipe, length: int, opened: int = 0) -> tuple[Economy, int]:
    """The same for scoring rows of `length` tokens; `opened` bytes of the result are held beside a block."""

    def needed(economy: Economy) -> int:
        return planned_evaluation(model, economy, rows=recipe.evaluation.rows, length=length) + opened

    return _choose(needed, model, recipe.run, length, 0)


def _choose(
    needed: Callable[[Economy], int], model: StreamedModel, run: RunSpec, row: int, statistics: int
) -> tuple[Economy, int]:
    """Batches, whose size changes how sums round, get smaller only within a budget that was given."""
    first = Economy(model.batch_tokens(run.batch_tokens))
    economies = first.thriftier(row=row, statistics=statistics, batches=run.memory is not None)
    return choose(needed, economies, memory_there(run))


def memory_there(run: RunSpec) -> int:
    """Bytes that a run may take: what is available, within its budget less what the libraries hold."""
    return free_memory() if run.memory is None else min(free_memory(), run.memory - LIBRARIES)


def planned_memory(work: Work, economy: Economy, *, rows: int, subset: bool) -> int:
    """Bytes of the compress step above the level after the imports.

    Args:
        work: what is done to which matrix.
        economy: how much is in memory at a time.
        rows: calibration rows, each of `work.length` tokens.
        subset: whether only one stretch of a block is calibrated at a time.
    """
    tokens = rows * work.length if work.needs_data else 0
    states = 0 if economy.on_disk else _streams(work) * tokens * work.model.hidden * FLOAT
    blocks = max(_block(work, block, economy, tokens, subset) for block in work.model.anatomy.blocks)
    twin = TWIN * (work.transforms is not None)
    compressed = states + max(
        blocks, *(_outside(work, part, economy, tokens) + _turned(work, part) for part in work.parts)
    )
    # While it is tuned, the states of the compressed model are gone.
    tuned = states // 2 + _tuning(work, economy, tokens) if work.tune is not None else 0
    shared = states + _sharing(work, economy, tokens) if work.stacks else 0
    sloping = _sloping(work, economy, tokens) if work.needs_slopes else 0  # no other states are there yet
    verified = work.opened_bytes + min(HEAD_ROWS, work.model.width) * work.model.hidden * FLOAT if work.pack else 0
    return FIXED + max(twin + max(compressed, tuned), shared, sloping, verified)


def planned_measuring(choices: Choices, economy: Economy, *, rows: int) -> int:
    """Bytes of measuring what candidates cost, above the level after the imports.

    Args:
        choices: what is measured.
        economy: how much is in memory at a time.
        rows: calibration rows.
    """
    works, model, spec = choices.works, choices.model, choices.spec
    tokens, few = rows * works[0].length, min(spec.rows, rows) * min(spec.length, works[0].length)
    part_of = {m: part.index for part in works[0].parts for m in part.matrices}
    streams = Counter(part_of[unit.matrices[0]] for unit in choices.units for _ in unit.options)
    states = (0 if economy.on_disk else tokens) + (max(streams.values()) + 2) * few
    lent = 2 * FLOAT * max(sum(m.numel for m in unit.matrices) for unit in choices.units)
    blocks = [
        max(_block(work, block, economy, tokens, False) for work in works)
        + sum(t.nbytes for m in block.matrices for work in works for t in work.packed(m).values())
        for block in model.anatomy.blocks
    ]
    ends = [part for part in works[0].parts if not isinstance(part, Block)]
    outside = [
        max(_outside(work, part, economy, tokens) for work in works)
        + sum(t.nbytes for m in part.matrices for work in works for t in work.packed(m).values())
        for part in ends
    ]
    logits = 4 * min(economy.logits, max(economy.batch_tokens, spec.length) * model.width * FLOAT)
    head = min(HEAD_ROWS, model.width) * model.hidden * FLOAT
    return FIXED + states * model.hidden * FLOAT + max(max(blocks) + lent, max(outside) + logits + head)


def planned_search(cuts: Cuts, work: Work, economy: Economy, *, rows: int) -> int:
    """Bytes of finding out what is cut, above the level after the imports.

    Args:
        cuts: what is open.
        work: of one of the candidates.
        economy: how much is in memory at a time.
        rows: calibration rows.
    """
    model, tokens = cuts.model, rows * work.length
    if not cuts.needs_data:
        return FIXED + TWIN
    few = min(cuts.spec.rows, rows) * min(SHORT, work.length)
    batch = _batch(work, economy, tokens)
    widest = max(m.shape[1] for block in model.anatomy.blocks for m in block.matrices)
    ranking = (1 + RANKING) * Hessian.bytes(widest) if cuts.spec.criterion == "obs" and cuts.widths else 0
    loaded = max(_weights(model, block) + _forward(model, block, batch) for block in model.anatomy.blocks)
    trial = max(_repairing(work, block, batch) for block in work.model.anatomy.blocks)
    logits = 4 * min(economy.logits, max(economy.batch_tokens, SHORT) * model.width * FLOAT)
    head = min(HEAD_ROWS, model.width) * model.hidden * FLOAT
    states = (0 if economy.on_disk else tokens) + 6 * few  # fitted: three streams; measured: one, its end, a trial's
    searching = states * model.hidden * FLOAT + max(loaded + ranking, loaded + trial, logits + head)
    if cuts.spec.criterion != "taylor":
        return FIXED + TWIN + searching
    between = 0 if economy.on_disk else (len(model.anatomy.blocks) + 3) * few * model.hidden * FLOAT
    learning = max(
        _weights(model, b) + _forward(model, b, batch) + _learning(model, b, batch) for b in model.anatomy.blocks
    )
    return FIXED + TWIN + max(searching, between + max(learning, logits + head))


def planned_ratios(ratios: Ratios, economy: Economy, *, rows: int) -> int:
    """Bytes of finding what share of each layer goes, above the level after the imports.

    Args:
        ratios: what is open.
        economy: how much is in memory at a time.
        rows: calibration rows.
    """
    work, model = ratios.work, ratios.model
    if ratios.spec.name in ("spectrum", "similarity"):  # as the compress step gathers, on a model of its own
        return TWIN + planned_memory(work, economy, rows=rows, subset=False)
    weighed = WEIGHED * FLOAT * max(m.numel for unit in ratios.units for m in unit.matrices)
    if not ratios.needs_data:
        return FIXED + TWIN + weighed
    tokens = rows * work.length
    batch = _batch(work, economy, tokens)
    norms = max(sum(Norm.bytes(group.width) for group in block.groups) for block in model.anatomy.blocks)
    loaded = max(_weights(model, block) + _forward(model, block, batch) for block in model.anatomy.blocks)
    states = 0 if economy.on_disk else tokens * model.hidden * FLOAT
    return FIXED + TWIN + states + norms + loaded + weighed


def compress_scratch(work: Work, recipe: Recipe) -> int:
    """Bytes on disk beside the output: hidden states, and the shards that become one file at the end.

    Of the states an older and a newer file for a resume, and those in use where they lie there.
    """
    rows = recipe.calibration.samples if work.needs_data else 0
    shards = sum(work.shard_bytes.values()) if work.apart else 0
    states = (2 + work.economy.on_disk) * _streams(work) * rows * work.length * work.model.hidden * FLOAT
    states += sum(t.nbytes for stack in work.stacks for t in work.packed(stack[0]).values())  # no less than the factor
    if work.needs_slopes:  # what lay between blocks is gone when tokens have been weighed
        there_and_back = _weighing(work, work.economy, rows * work.length) if work.economy.on_disk else 0
        counts = sum(len(weighed(work, block)) for block in work.model.anatomy.blocks)
        states = max(states, there_and_back) + rows * work.length * FLOAT * counts
    if work.tune is None:
        return shards + states
    between = _between(work, work.economy, rows * work.length) if work.economy.on_disk else 0
    return shards + states + between + SAVED * FLOAT * work.tuned_numbers


def _streams(work: Work) -> int:
    """Of hidden states: those between the compressed blocks, and where they are looked at, the original's."""
    return 1 + work.needs_originals * (1 + (work.original is not None))


def evaluation_states(model: StreamedModel, rows: int, length: int) -> int:
    """Bytes of the hidden states of both models on a text of `rows` x `length` tokens."""
    return 2 * rows * length * model.hidden * FLOAT


def statistics_bytes(work: Work) -> int:
    """Bytes of the statistics of the block that has most of them."""
    blocks = work.model.anatomy.blocks
    return max(sum(map(work.statistic_bytes, block.groups)) for block in blocks)


def planned_evaluation(model: StreamedModel, economy: Economy, *, rows: int, length: int) -> int:
    """Bytes of scoring a text of `rows` x `length` tokens: the states of both models, a block, some logits.

    Args:
        model: the original.
        economy: how much is in memory at a time.
        rows: of the longest text.
        length: of a row.
    """
    states = 0 if economy.on_disk else evaluation_states(model, rows, length)
    batch = min(max(economy.batch_tokens, length), rows * length)
    head = min(HEAD_ROWS, model.width) * model.hidden * FLOAT
    block = max(_weights(model, b) + _forward(model, b, batch) for b in model.anatomy.blocks)
    scored = max(block, 4 * min(economy.logits, batch * model.width * FLOAT) + head)
    return LIBRARIES + FIXED + states + scored  # the process that starts readers is there all the time


def _block(work: Work, block: Block, economy: Economy, tokens: int, subset: bool) -> int:
    """The largest of its phases: inputs gathered, one group after another compressed, the way to the next block."""
    batch = _batch(work, economy, tokens)
    loaded = _weights(work.model, block) + _forward(work.model, block, batch)
    packed = 2 * sum(t.nbytes for t in work.meta_tensors(block).values())  # the block before is still being written
    groups = [g for g in block.groups if any(m in work.methods for m in g.matrices)]
    sizes = [work.statistic_bytes(group) for group in groups]
    together = passes(sizes, 0 if subset else economy.statistics)
    phases = [0]
    for part in together:
        kept = sum(sizes[part])
        phases.append(loaded + kept if kept else 0)
        for group, size in zip(groups[part], sizes[part], strict=True):
            methods = [work.methods[m] for m in group.matrices if m in work.methods]
            factors = _factors(work, group)
            if all(method.in_stretches for method in methods):
                sweep = SWEEP * FLOAT * min(sum(m.numel for m in group.matrices), STACK)
            else:
                sweep = max(work.methods[m].scratch(m.shape) for m in group.matrices if m in work.methods)
            lanes = lanes_of(work.model.device) if is_small(group) else 1
            phases.append(kept + lanes * max(factors, factors // 3 + sweep))
            kept -= size
    phases += [loaded + kept for kept in _transforming(work, block, economy)]
    if work.reconstruct is not None:
        learned = [m for m in block.matrices if m in work.methods]
        copies = sum(m.numel * (LEARNING + TABLED * _has_tables(work, m)) for m in learned)
        phases.append(loaded + _learning(work.model, block, batch) + FLOAT * copies)
    if work.repair is not None:
        phases.append(loaded + _repairing(work, block, batch))
    decoded = max((m.numel for m in block.matrices), default=0) * FLOAT
    return packed + max([*phases, loaded + decoded])


def _has_tables(work: Work, matrix: Matrix) -> bool:
    form = work.form(matrix).weight
    return any(isinstance(part, Codebook) for part in (form.parts if isinstance(form, Sum) else (form,)))


def _sharing(work: Work, economy: Economy, tokens: int) -> int:
    """The pass over a second model that makes shared factors: inputs of all matrices that wait, and a stack of them."""
    model, batch = work.model, _batch(work, economy, tokens)
    group_of = {
        m: (block.index, group) for block in model.anatomy.blocks for group in block.groups for m in group.matrices
    }
    waiting: dict[int, set[tuple[int, Group]]] = {}
    for stack in work.stacks:
        waiting.setdefault(group_of[stack[0]][0], set()).update(group_of[m] for m in stack)
    kept = max(sum(Hessian.bytes(group.width) for _, group in groups) for groups in waiting.values())
    factors = max(_factors(work, group) for groups in waiting.values() for _, group in groups)
    largest = max(basis.scratch((len(stack) * stack[0].shape[0], stack[0].shape[1])) for stack in work.stacks)
    loaded = max(_weights(model, block) + _forward(model, block, batch) for block in model.anatomy.blocks)
    return TWIN + loaded + kept + max(factors, largest)


def _sloping(work: Work, economy: Economy, tokens: int) -> int:
    """A pass of gradients through a second model: states between its blocks, and a block with its graph or logits."""
    model, batch = work.model, _batch(work, economy, tokens)
    blocks, lanes = model.anatomy.blocks, lanes_of(model.device)
    states = _weighing(work, economy, tokens)
    if economy.on_disk:
        states = 2 * states // (len(blocks) + 3)  # gradients
    block = max(
        _weights(model, b) + lanes * _learning(model, b, batch) + _forward(model, b, batch) // lanes for b in blocks
    )
    head = min(HEAD_ROWS, model.width) * model.hidden * FLOAT
    logits = DRAWN * min(economy.logits, batch * model.width * FLOAT) + head
    return TWIN + states + max(block, logits)


def _weighing(work: Work, economy: Economy, tokens: int) -> int:
    """The states of the rows that go there and back together: those between blocks, and some more."""
    depth = len(work.model.anatomy.blocks)
    part = min(tokens, together(tokens, depth) + _batch(work, economy, tokens))
    return (depth + 3) * part * work.model.hidden * FLOAT


def _repairing(work: Work, block: Block, batch: int) -> int:
    """The original's block beside the smaller one, and the sums of what is fitted, solved in float64."""
    if work.repair is None or work.original is None:
        return 0
    whole = work.original.model
    twin = whole.anatomy.blocks[work.original.blocks[block.index]]
    repaired = [[m for m in g.matrices if m in work.repair.matrices] for g in block.groups]
    sums = [2 * sum(m.shape[1] ** 2 + m.numel for m in found) * FLOAT for found in repaired]
    return _weights(whole, twin) + _forward(whole, twin, batch) + FITTING * max(sums, default=0)


def _transforming(work: Work, block: Block, economy: Economy) -> Iterator[int]:
    """What a transform has beside a block's weights: statistics, and one matrix while candidates are tried on it."""
    if work.transforms is None:
        return
    largest = max((m.numel for m in block.matrices), default=0)
    yield 2 * FLOAT * largest  # while it is changed
    for scaling in work.transforms.scalings:
        links = work.transforms.links(block.index, scaling)
        sizes = [sum(scaling.needs.bytes(group.width) for group in link.groups) for link in links]
        for part in passes(sizes, economy.statistics):
            yield sum(sizes[part]) + FLOAT * largest + SWEEP * FLOAT * min(largest, STACK)


def _turned(work: Work, part: Part) -> int:
    """Tensors outside of the blocks that are no longer those of the mapped files."""
    if isinstance(part, Block) or work.transforms is None or work.transforms.stream is None:
        return 0
    infos = work.model.weights.infos
    exact = {matrix.key for matrix in part.matrices if matrix in work.methods}
    changed = [key for key in part.keys if key in work.transforms.outside]
    return sum(infos[key].numel * FLOAT if key in exact else infos[key].bytes for key in changed)


def _tuning(work: Work, economy: Economy, tokens: int) -> int:
    """Moves and their averages, states between all blocks, and a block with its gradients or a stretch of logits."""
    assert work.tune is not None
    model, batch = work.model, _batch(work, economy, tokens)
    between = 0 if economy.on_disk else _between(work, economy, tokens)
    blocks = model.anatomy.blocks
    block = max(LENT * _weights(model, b) + _forward(model, b, batch) + _learning(model, b, batch) for b in blocks)
    head = min(HEAD_ROWS, model.width) * model.hidden * FLOAT
    logits = COMPARED * min(economy.logits, batch * model.width * FLOAT) + head
    gradients = _step(work, economy, tokens) * model.hidden * FLOAT
    return TUNED * FLOAT * work.tuned_numbers + between + gradients + max(block, logits)


def _between(work: Work, economy: Economy, tokens: int) -> int:
    """Bytes of the states between blocks of one step of tuning, or of the rows held back."""
    states = (len(work.model.anatomy.blocks) + 1) * _step(work, economy, tokens)
    return max(states, tokens // HELD + _batch(work, economy, tokens)) * work.model.hidden * FLOAT


def _step(work: Work, economy: Economy, tokens: int) -> int:
    """Tokens in a step of tuning: whole batches."""
    assert work.tune is not None
    batch = _batch(work, economy, tokens)
    return min(tokens, -(-work.tune.tokens // batch) * batch)


def _batch(work: Work, economy: Economy, tokens: int) -> int:
    return min(max(economy.batch_tokens, work.length), tokens or work.length)


def _outside(work: Work, part: Part, economy: Economy, tokens: int) -> int:
    """A part that is no block: its matrix is compressed in stretches, and its codes are held in full to be packed."""
    if isinstance(part, Block) or not part.matrices:
        return 0
    matrix, (group,) = part.matrices[0], part.groups
    size, method, model = work.statistic_bytes(group), work.methods[matrix], work.model
    factors = _factors(work, group)
    packed = sum(tensor.nbytes for tensor in work.meta_tensors(part).values())
    sweep = SWEEP * FLOAT * min(matrix.numel, STACK) if method.by_row else method.scratch(matrix.shape)
    compressing = factors + sweep + PACKING * matrix.numel + packed
    if part.index < 0 and size:  # the way of the states through the original
        batch = _batch(work, economy, tokens)
        compressing = max(compressing, *(_weights(model, b) + _forward(model, b, batch) for b in model.anatomy.blocks))
    return size + compressing


def _factors(work: Work, group: Group) -> int:
    """What factorising a group's Hessian takes at its peak; with the original's inputs, what solving with it takes."""
    size, kinds = Hessian.bytes(group.width), work.needs(group)
    if Cross in kinds:
        return int(max(PANELS / FLOAT, SOLVING) * size) + size  # the factors are kept
    return int(PANELS * size / FLOAT) if any(issubclass(kind, Hessian) for kind in kinds) else 0


def _weights(model: StreamedModel, block: Block) -> int:
    return sum(model.weights.infos[key].numel for key in block.keys) * FLOAT


def _learning(model: StreamedModel, block: Block, batch: int) -> int:
    """What a pass of gradients keeps of a block's inner results, beside what a forward pass has at a time."""
    inner = sum(m.shape[0] for m in block.matrices)
    return batch * (12 * model.hidden + 3 * inner) * FLOAT


def _forward(model: StreamedModel, block: Block, batch: int) -> int:
    widest = max((max(m.shape) for m in block.matrices), default=0)
    return lanes_of(model.device) * batch * (6 * model.hidden + 5 * widest) * FLOAT
