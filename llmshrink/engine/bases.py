"""Right factors that matrices of several blocks share: made in a pass of their own before anything is compressed.

Of each set one file lies in the folder of work, where methods find it (mapped, so that memory does not grow with the
number of sets). What makes a factor is the original model's inputs; what each matrix then makes of it is fitted to the
inputs that it really gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmshrink.engine.gather import gather
from llmshrink.engine.groups import by_weights, starved
from llmshrink.engine.hidden import Hidden
from llmshrink.io import safetensors
from llmshrink.io.files import has_hash, sealed, unsealed, write_bytes
from llmshrink.memory import trim
from llmshrink.methods.base import Method
from llmshrink.methods.basis import basis
from llmshrink.methods.lowrank import LowRankMethod, Metric
from llmshrink.methods.svdllm import SvdLlm
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
    needs: dict[Group, tuple[type[Statistic], ...]] = {
        group: (NoStatistic, methods[next(m for m in group.matrices if m in methods)].statistic) for group in groups
    }
    sizes = [sum(kind.bytes(group.width) for kind in needs[group]) for group in groups]
    for part in passes(sizes, economy.statistics):
        wanted = groups[part]
        gathered = gather(model, block, wanted, {group: needs[group] for group in wanted}, hidden) if hidden else {}
        for group in wanted:
            for matrix in (m for m in group.matrices if m in methods):
                method = methods[matrix]
                if group in gathered and starved(matrix, gathered[group][NoStatistic].tokens):
                    method = by_weights(method)  # as it will be compressed
                assert isinstance(method, LowRankMethod)
                kind = method.statistic
                seen = gathered[group][kind] if group in gathered else kind(group.width, model.device)
                yield matrix, method.metric(method.prepare(seen))


def make_bases(work: Work, batches: list[Tensor], *, folder: Path, progress: Progress) -> None:
    """Make the right factors that matrices of a plan share, and tell their methods.

    A run that goes on has them already: what is compressed was made with them.

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
            assert isinstance(method, SvdLlm) and method.place is not None
            place = replace(method.place, right=made.get("right"), pivots=made.get(matrix.name))
            work.methods[matrix] = method.at(place)


def _make(work: Work, batches: list[Tensor], folder: Path, progress: Progress) -> dict[str, str]:
    """The files, one for each stack, with their SHA-256."""
    # Of its own, because whoever compresses may replace the embedding before any row is embedded.
    model = StreamedModel(work.model.source, work.model.device)
    economy, files = work.economy, {}
    hidden = Hidden(model, batches, folder=folder if economy.on_disk else None)
    ends = {stack[-1].key: number for number, stack in enumerate(work.stacks)}
    shared = {m.key: work.methods[m] for stack in work.stacks for m in stack}
    seen: dict[str, Metric] = {}
    last = max(block.index for block in model.anatomy.blocks if any(m.key in shared for m in block.matrices))
    progress.start("make what blocks share", last + 1)
    for block in model.anatomy.blocks[: last + 1]:
        model.load_block(block.index)
        methods = {m: shared[m.key] for m in block.matrices if m.key in shared}
        for matrix, metric in metrics(block, methods, model, hidden, economy):
            seen[matrix.key] = metric
            if (number := ends.get(matrix.key)) is not None:
                path = folder / _name(number)
                files[path.name] = _write(path, work, work.stacks[number], model, seen)
        hidden.advance(block.index)
        model.drop_block(block.index)
        trim()
        progress.advance(1, f"block {block.index}")
    progress.finish()
    return files


def _write(path: Path, work: Work, stack: tuple[Matrix, ...], model: StreamedModel, seen: dict[str, Metric]) -> str:
    """The right factor of a stack, and the rows of each matrix in it; what was seen of its inputs is let go."""
    method = work.methods[stack[0]]
    assert isinstance(method, SvdLlm) and method.place is not None
    rank = method.config.rank_of(method.place.stacked(stack[0].shape))
    weights = [model.read(matrix).double() for matrix in stack]
    right, chosen = basis(weights, [seen.pop(matrix.key) for matrix in stack], rank, stack[0].dtype)
    named = {matrix.name: rows for matrix, rows in zip(stack, chosen, strict=True)}
    return safetensors.write(path, {"right": right, **named})


def _name(number: int) -> str:
    return f"basis-{number:05d}.safetensors"
