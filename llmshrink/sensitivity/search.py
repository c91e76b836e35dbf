"""What is cut out of a model: its parts are ranked in one pass, layers and shapes are compared by what they cost.

One pass over the original with all calibration rows ranks neurons, heads, experts and channels of every block; without
rows the weights alone do. Which layers go, and which of several shapes it is where a size is asked for, is measured on
a few rows: each candidate is made as it would be written, repaired, and its output compared with the original's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from llmshrink.calibration.rows import Rows
from llmshrink.engine.groups import GroupCompressor, Made
from llmshrink.engine.hidden import Hidden
from llmshrink.engine.repair import repair
from llmshrink.errors import InputError, PlanError
from llmshrink.evaluate.agreement import Agreement
from llmshrink.evaluate.metrics import Scores
from llmshrink.evaluate.texts import compare_batch, score_batch
from llmshrink.forms import Event
from llmshrink.memory import trim
from llmshrink.model.anatomy import Block, Group
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.widths import Chosen
from llmshrink.plan.cut import Cuts, Shape
from llmshrink.plan.economy import Economy
from llmshrink.plan.work import Work
from llmshrink.progress import Progress
from llmshrink.sensitivity.ranks import Ranker, Ranks
from llmshrink.statistics import Gathered, NoStatistic

LENGTH = 256  # tokens of the few rows on which candidates are compared


@dataclass(frozen=True)
class Tried:
    """One candidate, and what it costs.

    Attributes:
        chosen: What is kept.
        why: By which criterion its layers were found.
        cost: KL(original || it), nats per token, or a squared relative error of what it gives out; None: not measured.
    """

    chosen: Chosen
    why: str
    cost: float | None = None


class Search:
    """Decides what is cut out.

    Attributes:
        events: What to tell of it.
    """

    def __init__(self, cuts: Cuts, rows: Rows | None, *, economy: Economy, folder: Path, progress: Progress) -> None:
        """Begin; nothing is computed yet.

        Args:
            cuts: what is open.
            rows: calibration text; None: weights alone say what goes.
            economy: how much is in memory at a time.
            folder: for hidden states, where the economy keeps them on disk.
            progress: told of the steps.
        """
        self._cuts, self._spec, self._economy, self._progress = cuts, cuts.spec, economy, progress
        # Of its own, because blocks of the original are loaded while those of candidates are.
        self._model = StreamedModel(cuts.model.source, cuts.model.device)
        self._rows, self._folder = rows, folder if economy.on_disk else None
        self._few, self._fit = ([], []) if rows is None else self._halves(rows, economy.batch_tokens)
        self.events: list[Event] = []
        self._ends: list[Tensor] = []
        self._known: dict[tuple[int, ...], dict[int, float]] = {}  # divergences, by the layers that are gone

    def _halves(self, rows: Rows, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """Batches of a few rows that judge, and of others that are fitted to: none are both, if there are two."""
        few = rows.first(2 * self._spec.rows, LENGTH)
        half = max(1, len(few.tokens) // 2)
        judged, fitted = few.tokens[:half], few.tokens[half:] or few.tokens
        return replace(few, tokens=judged).batches(tokens), replace(few, tokens=fitted).batches(tokens)

    def run(self) -> list[Tried]:
        """All candidates with their costs, the chosen one first."""
        ranker = Ranker(self._cuts, self._model, folder=self._folder, progress=self._progress)
        if self._rows is None:
            ranks = ranker.by_weights()
        else:
            ranks = ranker.run(self._rows.batches(self._economy.batch_tokens), self._fit, self._economy.logits)
        self.events += ranks.events
        candidates = [one for shape in self._cuts.shapes for one in self._of(shape, ranks)]
        if not candidates:
            raise PlanError(
                f"{self._model.source.id}: the layers that cost least to lose leave more than the target allows.",
                hint="Name the layers to keep (--layers 0,1,4), or a smaller target.",
            )
        if len(candidates) == 1:
            return candidates
        self._progress.start("compare candidates", len(candidates))
        tried, why = [], "what is left gives infinite or undefined output."
        for one in candidates:
            try:
                cost = self._cost(self._cuts.work(one.chosen))
            except (InputError, PlanError) as error:  # of this candidate: others may well do
                self.events.append(Event("not_tried", f"{one.why}: {error}"))
                self._progress.event(self.events[-1])
                cost, why = math.inf, str(error)
            tried.append(Tried(one.chosen, one.why, cost if math.isfinite(cost) else None))
            self._progress.advance(1, f"{one.why}: {cost:.4g}")
        self._progress.finish()
        if all(one.cost is None for one in tried):
            raise InputError(
                f"{self._model.source.id}: none of {len(tried)} candidates can be made. {why}",
                hint="Keep more, cut something else, or name the layers to keep.",
            )
        return sorted(tried, key=lambda one: one.cost if one.cost is not None else math.inf)

    # --- candidates

    def _of(self, shape: Shape, ranks: Ranks) -> Iterator[Tried]:
        """The candidates of a shape: one for each set of layers that a criterion finds."""
        inside = {
            name: tuple(order[: shape.counts[name]].sort().values for order in found)
            for name, found in ranks.orders.items()
        }
        channels = None
        if ranks.channels is not None:
            order = ranks.channels.argsort(descending=True, stable=True)
            channels = order[: shape.counts["hidden"]].sort().values
        words = [f"{count} {name}" for name, count in self._cuts.sizes(shape).items()]
        seen: set[tuple[int, ...]] = set()
        for why, layers in self._layers(shape, ranks):
            if layers not in seen:
                seen.add(layers)
                chosen = Chosen(layers, inside, channels)
                if not self._cuts.fits(chosen):  # layers are not alike, and these are larger than the first
                    continue
                yield Tried(chosen, ", ".join(words) + (f" by {why}" if why else ""))

    def _layers(self, shape: Shape, ranks: Ranks) -> Iterator[tuple[str, tuple[int, ...]]]:
        total, asked = self._cuts.layers, self._spec.layer_criterion
        if shape.named is not None or shape.layers == total:
            yield "", shape.named or tuple(range(total))
            return
        less = total - shape.layers
        if asked in ("influence", "search"):
            worst = sorted(range(total), key=lambda i: ranks.influence[i])[:less]
            yield "influence", _without(total, worst)
        if asked in ("angular", "search"):
            start = min(range(total - less + 1), key=lambda i: float(ranks.turned[i, i + less]))
            yield "angular", _without(total, range(start, start + less))
        if asked in ("divergence", "search"):
            first = self._divergences(())
            worst = sorted(range(total), key=lambda i: first[i])[:less]
            yield "divergence", _without(total, worst)
        if asked == "search" and less > 1:
            gone = [min(first, key=lambda i: first[i])]
            while len(gone) < less:
                found = self._divergences(tuple(gone))
                gone.append(min(found, key=lambda i: found[i]))
            yield "divergence one after another", _without(total, gone)

    # --- costs

    def _divergences(self, gone: Sequence[int]) -> dict[int, float]:
        """What the model without each layer costs, those that are gone already left out too."""
        if (known := self._known.get(tuple(sorted(gone)))) is not None:
            return known
        hidden = Hidden(self._model, self._few)
        left = [block for block in self._model.anatomy.blocks if block.index not in gone]
        found = self._known.setdefault(tuple(sorted(gone)), {})
        for number, block in enumerate(left):
            streams = [[state.clone() for state in hidden.states]]
            for later in left[number + 1 :]:
                self._through(later, hidden, streams)
            cost = self._compared(self._model, streams[0])
            found[block.index] = cost if math.isfinite(cost) else math.inf
            self._through(block, hidden, [hidden.states])
        return found

    def _through(self, block: Block, hidden: Hidden, streams: list[list[Tensor]]) -> None:
        self._model.load_block(block.index)
        hidden.advance_streams(block.index, streams)
        self._model.drop_block(block.index)
        trim()

    def _cost(self, work: Work) -> float:
        """What a candidate costs, made, and repaired on other rows than it is measured on."""
        model, original = work.model, None if work.repair is None else work.original
        hidden = Hidden(model, self._fit, originals=original is not None, original=original)
        measured = Hidden(model, self._few)
        groups = GroupCompressor(work)
        for block in model.anatomy.blocks:
            made = Made()
            if work.repair is not None:
                made.tensors |= {key: model.weights.dense(key) for key in block.keys}
                statistics: dict[Group, Gathered] = {
                    g: {NoStatistic: NoStatistic(g.width, model.device)} for g in block.groups
                }
                for found in groups.compress(list(block.groups), statistics):
                    made.add(found)
                hidden.advance_originals(block.index)
                repair(block, made, hidden, groups, work.repair)
            model.load_block(block.index, made.decoded)
            hidden.advance(block.index)
            measured.advance(block.index)
            model.drop_block(block.index)
            trim()
        return self._compared(model, measured.states)

    def _compared(self, model: StreamedModel, states: list[Tensor]) -> float:
        """How far what states end in, through the head of their model, is from the original's."""
        limit = self._economy.logits
        if not self._ends:
            hidden = Hidden(self._model, self._few)
            for block in self._model.anatomy.blocks:
                self._through(block, hidden, [hidden.states])
            self._ends = hidden.states
        if self._model.task.causal:
            scores = [Scores(), Scores()]
            for batch, tokens in enumerate(self._few):
                score_batch([self._model, model], [self._ends[batch], states[batch]], tokens, scores, limit)
            return scores[1].kl or 0.0
        agreement = Agreement(distribution=model.distribution)
        for batch, tokens in enumerate(self._few):
            compare_batch([self._model, model], [self._ends[batch], states[batch]], tokens, agreement, limit)
        return (agreement.kl if model.distribution else (agreement.relative_error or 0.0) ** 2) or 0.0


def _without(total: int, gone: Sequence[int] | range) -> tuple[int, ...]:
    return tuple(i for i in range(total) if i not in gone)
