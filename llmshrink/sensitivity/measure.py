"""What each candidate costs in each unit of a model: one unit is compressed, all else stays the original.

The original's blocks are taken one after another. Its inputs are calibrated once for all candidates, each candidate is
made by its method as it would be written, put into the otherwise original block, and run on a few rows. The error in
what leaves the block is known at once; for the divergence in what the model gives out these states go on through all
later blocks, each loaded once for all candidates. So memory holds the states of one block's candidates at a time,
however deep the model is, and the costs of all units together stand for those of choosing them together.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from llmshrink.calibration.rows import Rows
from llmshrink.engine.gather import gather, gather_head, gather_tied
from llmshrink.engine.groups import GroupCompressor, Made
from llmshrink.engine.hidden import Hidden
from llmshrink.errors import InputError
from llmshrink.evaluate.agreement import Agreement
from llmshrink.evaluate.metrics import Scores
from llmshrink.evaluate.texts import compare_batch, score_batch
from llmshrink.memory import trim
from llmshrink.model.anatomy import Block, Group, Part
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.choices import Choices, Unit
from llmshrink.plan.economy import Economy, passes
from llmshrink.progress import Progress
from llmshrink.sensitivity.kept import Kept
from llmshrink.statistics import Gathered, Statistic

Costs = dict[Unit, list[float]]  # of each option of a unit


class Sensitivity:
    """Measures all candidates of a model."""

    def __init__(
        self, choices: Choices, rows: Rows, *, economy: Economy, folder: Path, kept: Kept, progress: Progress
    ) -> None:
        """Begin; nothing is computed yet.

        Args:
            choices: what is measured.
            rows: calibration text; the first of them are measured on.
            economy: how much is in memory at a time.
            folder: for hidden states, where the economy keeps them on disk.
            kept: costs that were measured before, and place for others.
            progress: told of the steps.
        """
        self._choices, self._spec = choices, choices.spec
        # Of its own, because whoever compresses may replace the embedding before any row is embedded.
        self._model = StreamedModel(choices.model.source, choices.model.device)
        self._economy, self._kept, self._progress = economy, kept, progress
        self._rows, self._folder = rows, folder if economy.on_disk else None
        self._hidden: Hidden  # all rows, and ...
        self._few: Hidden  # ... those that are measured on
        self._ends: list[Tensor] = []

    def measure(self) -> list[list[float]]:
        """The cost of each option of each unit, in their order.

        KL(original || model) is in nats per token; of a model whose output is no distribution, and where the error of
        blocks is asked for, it is a squared error relative to what it should be.
        """
        parts = self._choices.works[0].parts
        done = {part.index: self._found(part) for part in parts}
        left = [part.index for part in parts if done[part.index] is None]
        costs: dict[Unit, list[float]] = {}
        if left:
            self._begin()
        self._progress.start("measure the candidates", sum(m.numel for part in parts for m in part.matrices))
        for part in parts:
            found, units = done[part.index], self._of(part)
            if found is None:
                found = {unit.name: values for unit, values in self._part(part, units).items()}
                self._kept.put(part.index, found)
            costs |= {unit: found[unit.name] for unit in units}
            if isinstance(part, Block) and left and part.index < left[-1]:
                self._advance(part)
            self._progress.advance(sum(m.numel for m in part.matrices), f"block {part.index}" if units else "")
        self._progress.finish()
        return [costs[unit] for unit in self._choices.units]

    def _found(self, part: Part) -> dict[str, list[float]] | None:
        """What was measured of a part before; None: not all of it."""
        names = {unit.name for unit in self._of(part)}
        found = self._kept.get(part.index) if names else {}
        return found if found is not None and found.keys() == names else None

    def _begin(self) -> None:
        """Embed the rows; for the divergence, see where those that are measured on end."""
        batches = self._rows.batches(self._economy.batch_tokens)
        self._hidden = Hidden(self._model, batches, folder=self._folder)
        few = self._rows.first(self._spec.rows, self._spec.length).batches(self._economy.batch_tokens)
        self._few = Hidden(self._model, few)
        if self._spec.score == "kl":
            self._ends = self._through([[state.clone() for state in self._few.states]], 0)[0]

    def _advance(self, block: Block) -> None:
        """Take all states through the original's block."""
        self._model.load_block(block.index)
        self._hidden.advance(block.index)
        self._few.advance(block.index)
        self._model.drop_block(block.index)
        trim()

    def _of(self, part: Part) -> list[Unit]:
        """The units that lie in a part."""
        inside = set(part.matrices)
        return [unit for unit in self._choices.units if unit.matrices[0] in inside]

    def _part(self, part: Part, units: list[Unit]) -> Costs:
        return self._block(part, units) if isinstance(part, Block) else self._outside(part, units)

    # --- blocks

    def _block(self, block: Block, units: list[Unit]) -> Costs:
        made = self._made(block, units)
        self._model.load_block(block.index)
        right = [self._few.run(block.index, b) for b in range(len(self._few.batches))]
        pairs = [(unit, option) for unit in units for option in unit.options]
        streams = [self._run_with(block, made[option], unit) for unit, option in pairs]
        self._model.drop_block(block.index)
        trim()
        if self._spec.score == "block":
            return _by_unit(pairs, [_error(stream, right) for stream in streams])
        streams = self._through(streams, block.index + 1)
        return _by_unit(pairs, self._divergences([(self._model, stream) for stream in streams]))

    def _made(self, block: Block, units: list[Unit]) -> list[Made]:
        """For each candidate what becomes of the block's matrices; their inputs are gathered once."""
        works = self._choices.works
        wanted = {m for unit in units for m in unit.matrices}
        inside = [(g, tuple(m for m in g.matrices if m in wanted)) for g in block.groups]
        groups = [Group(group.sites, matrices) for group, matrices in inside if matrices]
        kinds = {g: self._kinds(g) for g in groups}
        sizes = [sum(kind.bytes(g.width) for kind in kinds[g]) for g in groups]
        made = [Made() for _ in works]
        for stretch in passes(sizes, self._economy.statistics):
            self._model.load_block(block.index)
            statistics = gather(self._model, block, groups[stretch], kinds, self._hidden)
            self._model.drop_block(block.index)
            for work, found in zip(works, made, strict=True):
                for part in GroupCompressor(work).compress(groups[stretch], dict(statistics)):
                    found.add(part)
                    trim()
        return made

    def _kinds(self, group: Group) -> tuple[type[Statistic], ...]:
        """What any candidate asks for of a group."""
        return tuple(dict.fromkeys(kind for work in self._choices.works for kind in work.needs(group)))

    def _run_with(self, block: Block, made: Made, unit: Unit) -> list[Tensor]:
        """What leaves the loaded block with one unit compressed, for each batch."""
        parameters = {m.parameter for m in unit.matrices}
        inside = [m for m in block.matrices if m.parameter in parameters]  # an expert may be left out
        compressed = {m.key for m in unit.matrices if m.key in made.decoded}
        weights = {
            m.key: (made.decoded[m.key].weight() if m.key in compressed else self._model.read(m).float()).to(
                self._model.device
            )
            for m in inside
        }
        with torch.no_grad():
            return [self._few.run(block.index, b, weights) for b in range(len(self._few.batches))]

    def _through(self, streams: list[list[Tensor]], first: int) -> list[list[Tensor]]:
        """States behind the last block, of those that enter block `first`."""
        for block in self._model.anatomy.blocks[first:]:
            self._model.load_block(block.index)
            self._few.advance_streams(block.index, streams)
            self._model.drop_block(block.index)
            trim()
        return streams

    # --- the embedding and the head

    def _outside(self, part: Part, units: list[Unit]) -> Costs:
        """The cost of an embedding or a head, each candidate in a model of its own."""
        (group,), (unit,), first = part.groups, units, part.index < 0
        statistics: Gathered = {kind: kind(group.width, self._model.device) for kind in self._kinds(group)}
        if any(kind.bytes(1) for kind in statistics):
            if first:
                hidden = Hidden(self._model, self._rows.batches(self._economy.batch_tokens), folder=self._folder)
                statistics = gather_tied(self._model, group, self._kinds(group), hidden)
            else:
                statistics = gather_head(self._model, group, self._kinds(group), self._hidden)
        streams: list[tuple[StreamedModel, list[Tensor]]] = []
        for option in unit.options:
            work = self._choices.works[option]
            (made,) = GroupCompressor(work).compress([group], {group: statistics})
            model = StreamedModel(self._model.source, self._model.device)
            matrix = unit.matrices[0]
            get = made.tensors.__getitem__
            model.replace(matrix, work.format.reader(work.slots[matrix], get, work.quantization_config))
            states = Hidden(model, self._few.batches).states if first else self._few.states
            streams.append((model, states))
        pairs = [(unit, option) for option in unit.options]
        if first and self._spec.score == "block":
            return _by_unit(pairs, [_error(states, self._few.states) for _, states in streams])
        if first:
            self._through([states for _, states in streams], 0)
        return _by_unit(pairs, self._divergences(streams))

    # --- scores

    def _divergences(self, streams: list[tuple[StreamedModel, list[Tensor]]]) -> list[float]:
        """How far what each stream of states ends in, through the head of its model, is from the original's."""
        models, limit = [self._model, *(model for model, _ in streams)], self._economy.logits
        if self._model.task.causal:
            scores = [Scores() for _ in models]
            for batch, tokens in enumerate(self._few.batches):
                score_batch(models, [self._end(batch), *(s[batch] for _, s in streams)], tokens, scores, limit)
            return [score.kl or 0.0 for score in scores[1:]]
        found = []
        for model, states in streams:
            agreement = Agreement(distribution=model.distribution)
            for batch, tokens in enumerate(self._few.batches):
                compare_batch([self._model, model], [self._end(batch), states[batch]], tokens, agreement, limit)
            found.append(agreement.kl if model.distribution else (agreement.relative_error or 0.0) ** 2)
        return [value or 0.0 for value in found]

    def _end(self, batch: int) -> Tensor:
        """The original's states behind the last block: where these were not asked for, its own have arrived there."""
        return (self._ends or self._few.states)[batch]


def _by_unit(pairs: list[tuple[Unit, int]], values: list[float]) -> Costs:
    """The values of each unit.

    Raises:
        InputError: one is no number.
    """
    costs: Costs = {}
    for (unit, option), value in zip(pairs, values, strict=True):
        if not math.isfinite(value):
            raise InputError(
                f"{unit.name}: with candidate {option + 1} what the model gives out is infinite or undefined.",
                hint="Leave that candidate out of allocate.candidates, or name these layers in `layers`.",
            )
        costs.setdefault(unit, []).append(value)
    return costs


def _error(found: list[Tensor], right: list[Tensor]) -> float:
    """||found - right||^2 / ||right||^2 over all batches."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, right, strict=True)]
    wrong, whole = sum(float((a - b).square().sum()) for a, b in pairs), sum(float(b.square().sum()) for _, b in pairs)
    return wrong / whole if whole else 0.0
