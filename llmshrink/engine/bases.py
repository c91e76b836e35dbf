"""What matrices of several blocks share: made in a pass of their own before anything is compressed.

Of each set one file lies in the folder of work, where methods find it (mapped, so that memory does not grow with the
number of sets). What makes a factor is the original model's inputs; what each matrix then makes of it is fitted to the
inputs that it really gets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmshrink.engine.gather import gather
from llmshrink.engine.groups import starved
from llmshrink.engine.hidden import Hidden
from llmshrink.io import safetensors
from llmshrink.io.files import has_hash, sealed, unsealed, write_bytes
from llmshrink.memory import trim
from llmshrink.methods import by_weights
from llmshrink.methods.base import Method
from llmshrink.methods.basis import Sharing
from llmshrink.methods.lowrank import LowRankMethod
from llmshrink.methods.metric import Metric
from llmshrink.model.anatomy import Block, Group, Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.economy import Economy, passes
from llmshrink.plan.work import Work
from llmshrink.progress import Progress
from llmshrink.statistics import NoStatistic, Statistic

MADE = "bases.json"  # in the folder of work: the files that are there, with their SHA-256


def metrics(
    block: Block,
    methods: Mapping[Matrix, Method[Any]],
    model: StreamedModel,
    hidden: Hidden | None,
    economy: Economy,
) -> Iterator[tuple[Matrix, Metric]]:
    """What the inputs of each matrix of a loaded block weigh, of those that have a method, in their order.

    Args:
        block: that is loaded.
        methods: of the matrices that are looked at.
        model: whose block it is.
        hidden: what enters it; None where the methods look at no text.
        economy: how much is in memory at a time.
    """
    groups = [group for group in block.groups if any(m in methods for m in group.matrices)]
    if not groups:
        return
    needs: dict[Group, tuple[type[Statistic], ...]] = {
        group: (NoStatistic, methods[next(m for m in group.matrices if m in methods)].statistic) for group in groups
    }
    sizes = [sum(kind.bytes(group.width) for kind in needs[group]) for group in groups]
    for part in passes(sizes, economy.statistics):
        wanted = groups[part]
        gathered = gather(model, block, wanted, {group: needs[group] for group in wanted}, hidden) if hidden else {}
        for group in wanted:
            known: dict[tuple[type[Method[Any]], Any], Metric] = {}
            for matrix in (m for m in group.matrices if m in methods):
                method = methods[matrix]
                if group in gathered and starved(matrix, gathered[group][NoStatistic].tokens):
                    method = by_weights(method)  # as it will be compressed
                assert isinstance(method, LowRankMethod | Sharing)
                key = (type(method), method.config)
                if key not in known:
                    kind = method.statistic
                    seen = gathered[group][kind] if group in gathered else kind(group.width, model.device)
                    known[key] = method.metric(method.prepare(seen))
                yield matrix, known[key]


def together(
    model: StreamedModel,
    methods: Mapping[str, Method[Any]],
    sets: Sequence[tuple[Matrix, ...]],
    hidden: Hidden | None,
    economy: Economy,
    progress: Progress,
) -> Iterator[tuple[tuple[Matrix, ...], list[Metric]]]:
    """Each set of matrices with what their inputs weigh, once the last of them was seen; blocks are loaded one by one.

    Args:
        model: whose matrices they are.
        methods: of all of them, by their keys.
        sets: in which they are, each in the order of blocks; a matrix may be in several.
        hidden: what enters the first block; None where the methods look at no text.
        economy: how much is in memory at a time.
        progress: told of each block.
    """
    ends: dict[str, list[tuple[Matrix, ...]]] = {}
    for one in sets:
        ends.setdefault(one[-1].key, []).append(one)
    waiting = Counter(matrix.key for one in sets for matrix in one)
    seen: dict[str, Metric] = {}
    for block in model.anatomy.blocks:
        model.load_block(block.index)
        open_ = {m: methods[m.key] for m in block.matrices if m.key in waiting}
        for matrix, metric in metrics(block, open_, model, hidden, economy):
            seen[matrix.key] = metric
            for one in ends.get(matrix.key, []):
                yield one, [seen[m.key] for m in one]
                waiting.subtract(m.key for m in one)
                seen = {key: known for key, known in seen.items() if waiting[key]}
        if hidden is not None:
            hidden.advance(block.index)
        model.drop_block(block.index)
        trim()
        progress.advance(1, f"block {block.index}")


def make_bases(work: Work, batches: list[Tensor], *, folder: Path, progress: Progress) -> None:
    """Make what matrices of a plan share, and tell their methods.

    A run that goes on has it already: what is compressed was made with it.

    Args:
        work: the plan.
        batches: token ids [rows, length] each.
        folder: of the run's work.
        progress: told of each block.
    """
    path = folder / MADE
    known = unsealed(path.read_bytes()) if path.is_file() else None
    if known is None or not all(has_hash(folder / name, digest) for name, digest in known.items()):
        write_bytes(path, sealed(_make(work, batches, folder, progress)))
    for number, stack in enumerate(work.stacks):
        made = safetensors.Checkpoint(folder, safetensors.read_header(folder / _name(number)))
        for matrix in stack:
            method = work.methods[matrix]
            assert isinstance(method, Sharing) and method.place is not None
            place = replace(method.place, right=made.get("right"), pivots=made.get(matrix.name))
            work.methods[matrix] = method.at(place)


def _make(work: Work, batches: list[Tensor], folder: Path, progress: Progress) -> dict[str, str]:
    """The files, one for each set, with their SHA-256."""
    # Of its own, because whoever compresses may replace the embedding before any row is embedded.
    model = StreamedModel(work.model.source, work.model.device)
    hidden = Hidden(model, batches, folder=folder if work.economy.on_disk else None)
    methods, files = {m.key: work.methods[m] for stack in work.stacks for m in stack}, {}
    progress.start("make what blocks share", len(model.anatomy.blocks))
    for stack, seen in together(model, methods, work.stacks, hidden, work.economy, progress):
        method = work.methods[stack[0]]
        assert isinstance(method, Sharing)
        right, chosen = method.join([model.read(matrix).double() for matrix in stack], seen, stack[0].dtype)
        named = {matrix.name: rows for matrix, rows in zip(stack, chosen, strict=True)}
        path = folder / _name(work.stacks.index(stack))
        files[path.name] = safetensors.write(path, {"right": right, **named})
    progress.finish()
    return files


def _name(number: int) -> str:
    return f"basis-{number:05d}.safetensors"
