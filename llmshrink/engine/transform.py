"""Transforms carried out: which map each link gets, block by block, and the proof that the block still does the same.

Nothing is written of it: the maps become changes of tensors that are made whenever they are read (`model/edits.py`), so
that every later step sees a model that was always so. The scales that were found for a block lie in a file of their
own, which its journal entry vouches for: a run that goes on puts them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.engine.groups import compressed
from llmshrink.engine.hidden import Hidden
from llmshrink.errors import LlmshrinkError
from llmshrink.forms import Event, decode
from llmshrink.io import safetensors
from llmshrink.memory import trim
from llmshrink.methods import by_weights
from llmshrink.methods.base import Method
from llmshrink.model.anatomy import Block, Group, Matrix
from llmshrink.model.flow import Link
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.economy import passes
from llmshrink.plan.transform import Transforms
from llmshrink.plan.work import Work
from llmshrink.report.schema import TransformReport
from llmshrink.statistics import Gathered, NoStatistic, Statistic
from llmshrink.transforms.base import Diagonal, Fed, Found, Scaling
from llmshrink.transforms.rotation import Rotation

Gather = Callable[[list[Group], tuple[type[Statistic], ...]], dict[Group, Gathered]]

ROUNDINGS = 8  # of the checkpoint's dtype by which the output of a block may change, beside ...
NOISE = 1e-3  # ... that of sums in another order


class Transformer:
    """Carries out the transforms of a plan."""

    def __init__(
        self, work: Work, transforms: Transforms, original: StreamedModel, probe: Tensor, folder: Path
    ) -> None:
        """Begin with a model as it is.

        Args:
            work: the whole plan, on a model of its own.
            transforms: what it does to weights.
            original: the same model, which is not changed.
            probe: token ids [rows, length] that a run takes along.
            folder: for the scales that are found.
        """
        self._probe = probe
        self._work, self._transforms, self._flow = work, transforms, transforms.flow
        self._model, self._original, self._folder = work.model, original, folder
        self._statistics = work.economy.statistics
        self._turn: Rotation | None = None  # of the states between blocks

    def begin(self, done: list[int]) -> None:
        """Make the changes that look at no data, and those of finished blocks, whose scales lie in their files."""
        weights = self._model.weights
        weights.exact = frozenset(matrix.key for matrix in self._work.methods)
        if self._transforms.values is not None:
            rotation = self._transforms.values
            for link in (link for block in self._flow.blocks for link in block.of("values")):
                weights.change(link.edits(rotation(link.size)))
        if self._transforms.stream is not None:
            self._turn = self._transforms.stream(self._model.hidden)
            weights.change(self._flow.turned(weights, self._turn))
        for index, number in product(done, range(len(self._transforms.scalings))):
            self._scale(index, number)

    # --- one block

    def block(
        self, block: Block, hidden: Hidden, gather: Gather, events: list[Event]
    ) -> tuple[list[TransformReport], dict[Path, str]]:
        """Choose the scales of a block, make its changes, and prove that it does what it did.

        Args:
            block: which one; it is not loaded.
            hidden: the states that enter it.
            gather: loads it as it is by now, and gives what is asked for of groups.
            events: what happens is told there.

        Returns:
            What each transform did, and the files that say so, with their SHA-256.

        Raises:
            LlmshrinkError: the block does something else than before.
        """
        files: dict[Path, str] = {}
        errors: list[float | None] = []
        for number, scaling in enumerate(self._transforms.scalings):
            chosen: dict[str, Tensor] = {}
            shares = []
            for link, found in self._search(block, scaling, gather):
                chosen[link.name] = self._storable(link, found.scale).cpu()
                shares += [] if found.error_left is None else [found.error_left]
            path = self._file(block.index, number)
            files[path] = safetensors.write(path, chosen)
            self._scale(block.index, number)
            errors.append(sum(shares) / len(shares) if shares else None)
        difference = self._prove(block, hidden, events)
        rotated = [None] * (len(self._transforms.names) - len(errors))
        return [
            TransformReport(block=block.index, name=name, error_left=error, difference=difference)
            for name, error in zip(self._transforms.names, [*rotated, *errors], strict=True)
        ], files

    def _file(self, index: int, number: int) -> Path:
        return self._folder / f"scales-{index:05d}-{number}.safetensors"

    def _scale(self, index: int, number: int) -> None:
        """Make the changes of a block that the file of its scales says; they stay mapped."""
        path = self._file(index, number)
        checkpoint = safetensors.Checkpoint(path.parent, safetensors.read_header(path))
        links = self._transforms.links(index, self._transforms.scalings[number])
        for link in links:
            self._model.weights.change(link.edits(Diagonal(checkpoint.get(link.name))))

    def _search(self, block: Block, scaling: Scaling[Any], gather: Gather) -> Iterator[tuple[Link, Found]]:
        """Scales for each link, in as many passes over the calibration rows as the memory asks for."""
        links, kinds = self._transforms.links(block.index, scaling), (NoStatistic, scaling.needs)
        sizes = [sum(scaling.needs.bytes(group.width) for group in link.groups) for link in links]
        for part in passes(sizes, self._statistics):
            fed_by = {group for link in links[part] for group in link.groups}
            statistics = gather([group for group in block.groups if group in fed_by], kinds)  # in the block's order
            for link in links[part]:
                fed = [self._fed(group, statistics[group]) for group in link.groups]
                yield link, scaling.search(fed, (link.times, link.size))
                trim()

    def _fed(self, group: Group, gathered: Gathered) -> Fed:
        methods = {m: by_weights(self._work.methods[m]) for m in group.matrices if m in self._work.methods}
        return Fed(
            gathered,
            gathered[NoStatistic].tokens,
            tuple(partial(self._read, matrix) for matrix in methods),
            tuple(partial(_rounded, method) for method in methods.values()),
        )

    def _read(self, matrix: Matrix) -> Tensor:
        return self._model.read(matrix).float()

    def _storable(self, link: Link, scale: Tensor) -> Tensor:
        """The scale next to this one by which a norm's weights are divided without an error of rounding."""
        if link.kind != "norm":
            return scale
        norm, weights = link.producers[0], self._model.weights
        stored = weights.get(norm.key).double().to(scale.device) + norm.offset
        divided = (stored / scale - norm.offset).to(weights.infos[norm.key].dtype).double() + norm.offset
        exact = (stored / divided).float()
        return torch.where(exact.isfinite() & (exact > 0), exact, scale)

    # --- the proof

    @torch.no_grad()
    def _prove(self, block: Block, hidden: Hidden, events: list[Event]) -> float:
        """By how much the output of a block changed on the probe rows, as a share of what it adds to its input.

        Raises:
            LlmshrinkError: by more than rounding explains.
        """
        state = hidden.states[-1].to(self._model.device)
        outputs = []
        for model, entering in ((self._original, self._unturned(state)), (self._model, state)):
            model.load_block(block.index)
            outputs.append(hidden.probe(model, block.index, entering))
            model.drop_block(block.index)
            trim()
        before, what = self._turned(outputs[0]), f"block {block.index}"
        if all(matrix.site.expert is None for matrix in block.matrices):
            return self._alike(what, before, outputs[1], state)
        return self._mostly_alike(what, before, outputs[1], state, events)

    @torch.no_grad()
    def prove_ends(self, hidden: Hidden) -> None:
        """Hold the embedding and the head, where they were changed, against the original's.

        Raises:
            LlmshrinkError: they do something else than before.
        """
        if self._turn is None:
            return
        embedded = self._original.record(self._probe).hidden
        embedding = self._model.anatomy.embedding
        if embedding not in self._work.methods:
            self._alike("the embedding", self._turned(embedded), hidden.states[-1])
        outputs = [
            model.output(self._probe, state)
            for model, state in ((self._original, embedded), (self._model, self._turned(embedded)))
        ]
        self._alike("the head", *outputs)

    def _turned(self, state: Tensor) -> Tensor:
        return state if self._turn is None else self._turn.produced(state)

    def _unturned(self, state: Tensor) -> Tensor:
        return state if self._turn is None else self._turn.back(state)

    def _alike(self, what: str, before: Tensor, after: Tensor, entering: Tensor | float = 0.0) -> float:
        before, after = before.double(), after.to(before.device).double()
        return self._small(what, float((after - before).norm() / (before - entering).norm()))

    def _mostly_alike(self, what: str, before: Tensor, after: Tensor, entering: Tensor, events: list[Event]) -> float:
        """The same for a block with experts: a router is rounded anew, and a token goes where it nearly went.

        What does not hold for a family shows in every token, so the median decides; tokens that differ are told.
        """
        before, after = before.double(), after.to(before.device).double()
        each = (after - before).norm(dim=-1) / (before - entering).norm(dim=-1)
        others = int((~(each <= self._limit)).sum())
        if others:
            message = f"{others} of {each.numel()} random tokens go to other experts in {what} once it is rewritten"
            events.append(Event("rerouted", message, data={"tokens": float(others)}))
        return self._small(what, float(each.median()))

    @property
    def _limit(self) -> float:
        dtype = self._model.source.config.dtype or torch.float32
        return max(NOISE, ROUNDINGS * torch.finfo(dtype).eps)

    def _small(self, what: str, difference: float) -> float:
        limit = self._limit
        if not difference <= limit:
            names = ", ".join(self._transforms.names)
            raise LlmshrinkError(
                f"{self._model.source.id}: after {names} {what} does not do what it did: its output on random tokens "
                f"differs by {difference:.1e} of itself, and rounding explains {limit:.0e}.",
                hint="What llmshrink knows of this family does not hold here. Leave out `transform`.",
            )
        return difference


def _rounded(method: Method[Any], weight: Tensor) -> Tensor:
    prepared = method.prepare(NoStatistic(weight.shape[1], weight.device))
    return decode(compressed(method, weight, prepared).weight)
