"""One pass over a model that ranks all that may be cut out of it: neurons, heads, experts, channels, layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from llmshrink.engine.gather import gather
from llmshrink.engine.hidden import Hidden
from llmshrink.forms import Event
from llmshrink.memory import trim
from llmshrink.model.anatomy import Block, Group, Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.widths import Width
from llmshrink.plan.cut import Cuts
from llmshrink.progress import Progress
from llmshrink.sensitivity.ranking import BY_COLUMN, eliminated, in_order, of_things
from llmshrink.sensitivity.routed import routed
from llmshrink.sensitivity.taylor import Taylor
from llmshrink.statistics import Gathered, Hessian, Moments, NoStatistic, Statistic

DAMP = 0.01  # of the Hessians by which neurons and heads are ranked, as a share of their mean diagonal


@dataclass
class Ranks:
    """What was found.

    Attributes:
        orders: Of each width of blocks the order of its things in each block of the original, best first.
        channels: Worth of each channel of the states between blocks.
        influence: 1 less the cosine between what enters a block and what leaves it, of each.
        turned: Angles, as shares of half a circle, between the states at any two boundaries of blocks.
        events: What is to be told.
    """

    orders: dict[str, list[Tensor]]
    channels: Tensor | None
    influence: list[float]
    turned: Tensor
    events: list[Event] = field(default_factory=list)


class Ranker:
    """Ranks the parts of one model."""

    def __init__(self, cuts: Cuts, model: StreamedModel, *, folder: Path | None, progress: Progress) -> None:
        """Begin.

        Args:
            cuts: what is open.
            model: of which the parts are.
            folder: for hidden states; None: in the device's memory.
            progress: told of each block.
        """
        self._cuts, self._model, self._folder, self._progress = cuts, model, folder, progress
        self._criterion = cuts.spec.criterion
        self._whole = cuts.widths.get("hidden")
        self._widths = [width for name, width in cuts.widths.items() if name != "hidden"]

    def run(self, batches: list[Tensor], few: list[Tensor], logits: int) -> Ranks:
        """The ranks by all batches of token ids; by gradients on a `few`, `logits` bytes of a head's output at a time.

        Influence is measured on as many batches as there are of these.
        """
        slopes: dict[tuple[int, str], Tensor] = {}
        if self._criterion == "taylor":
            readers = {
                (block.index, width.name): (readers[0], width.total)
                for block in self._model.anatomy.blocks
                for width in self._widths
                if (readers := _readers(width, block))
            }
            if readers:
                states = Hidden(self._model, few, folder=self._folder)
                slopes = Taylor(self._model, readers, logits).run(states, self._folder)
        self._progress.start("rank what can be cut", len(self._model.anatomy.blocks))
        hidden = Hidden(self._model, batches, folder=self._folder)
        ranks = Ranks({width.name: [] for width in self._widths}, None, [], torch.zeros(0))
        if self._whole is not None:
            ranks.channels = torch.zeros(self._whole.total, dtype=torch.float64)
        lasts = [_last_tokens(hidden)]
        for block in self._model.anatomy.blocks:
            self._look(block, hidden, ranks, slopes)
            ranks.influence.append(self._advance(block, hidden, len(few)))
            lasts.append(_last_tokens(hidden))
            self._progress.advance(1, f"block {block.index}: influence {ranks.influence[-1]:.3f}")
        ranks.turned = torch.stack([torch.stack([_angle(a, b) for b in lasts]) for a in lasts])
        self._progress.finish()
        return ranks

    def by_weights(self) -> Ranks:
        """The ranks of what is within blocks by magnitude, without any text."""
        orders: dict[str, list[Tensor]] = {width.name: [] for width in self._widths}
        for block in self._model.anatomy.blocks:
            for width in self._widths:
                orders[width.name].append(in_order(self._magnitude(width, block)))
        return Ranks(orders, None, [], torch.zeros(0))

    def _look(self, block: Block, hidden: Hidden, ranks: Ranks, slopes: dict[tuple[int, str], Tensor]) -> None:
        """Rank what is in one block; it is loaded afterwards."""
        readers = {width.name: _readers(width, block) for width in self._widths}
        kinds = self._kinds(block, [m for found in readers.values() for m in found])
        self._model.load_block(block.index)
        gathered = gather(self._model, block, list(kinds), kinds, hidden) if kinds else {}
        for width in self._widths:
            if (known := slopes.get((block.index, width.name))) is not None:
                order = in_order(known)
            elif width.members and self._criterion != "magnitude":
                order = self._routed(width, block, hidden, ranks)
            else:
                order = self._order(width, block, readers[width.name], gathered)
            ranks.orders[width.name].append(order.cpu())
        if ranks.channels is not None:
            for group, found in gathered.items():
                if self._reads_states(group):
                    square = found[Moments]
                    assert isinstance(square, Moments)
                    ranks.channels += square.square.double().cpu().sqrt()

    def _routed(self, width: Width, block: Block, hidden: Hidden, ranks: Ranks) -> Tensor:
        """The experts of a block, those that add most first; all in order where it has none."""
        if not any(key in width.members for key in block.keys):
            return torch.arange(width.total)
        worth, tokens = routed(self._model, block, hidden, width.total)
        if unseen := int((tokens == 0).sum()):
            message = f"{unseen} of its {width.total} experts got no token of the calibration text: they go first"
            ranks.events.append(Event("unseen_experts", message, block.prefix))
        return in_order(worth)

    def _reads_states(self, group: Group) -> bool:
        return self._whole is not None and any((m.key, _inputs(m)) in self._whole.axes for m in group.matrices)

    def _kinds(self, block: Block, readers: list[Matrix]) -> dict[Group, tuple[type[Statistic], ...]]:
        kinds: dict[Group, tuple[type[Statistic], ...]] = {}
        for group in block.groups:
            wanted: list[type[Statistic]] = []
            if any(m in readers for m in group.matrices):
                wanted += [Hessian] if self._criterion == "obs" else [Moments] * (self._criterion in BY_COLUMN)
            if self._reads_states(group):
                wanted.append(Moments)
            if wanted:
                kinds[group] = (NoStatistic, *dict.fromkeys(wanted))
        return kinds

    def _order(self, width: Width, block: Block, readers: list[Matrix], gathered: dict[Group, Gathered]) -> Tensor:
        """The things of one width in one block, best first; all in order where the block has none of them."""
        if not readers and not width.members:
            return torch.arange(width.total)
        if self._criterion == "magnitude" or width.members:
            return in_order(self._magnitude(width, block))
        (matrix,) = readers
        unit = matrix.shape[1] // width.total
        found = next(of for group, of in gathered.items() if matrix in group.matrices)
        weight = self._model.read(matrix).float()
        if self._criterion == "obs":
            hessian = found[Hessian]
            assert isinstance(hessian, Hessian)
            least = min(shape.counts[width.name] for shape in self._cuts.shapes)
            return eliminated(hessian.matrix, weight, unit, least, DAMP)
        moments = found[Moments]
        assert isinstance(moments, Moments)
        return of_things(BY_COLUMN[self._criterion](moments.mean, moments.square, weight), unit)

    def _magnitude(self, width: Width, block: Block) -> Tensor:
        """The sum of squares of all weights that belong to each thing of a block [things], float64."""
        total = torch.zeros(width.total, dtype=torch.float64)
        axes = {} if width.members else width.axes  # of experts a router says nothing
        for (key, axis), units in axes.items():
            if key in block.keys:
                stored = self._model.weights.get(key).double().movedim(axis, 0)
                tensor, start = stored.reshape(len(stored), -1), 0
                for unit in units:
                    stretch = tensor[start : start + unit * width.total].square().sum(1)
                    total += stretch.view(width.total, unit).sum(1)
                    start += unit * width.total
        for key in (key for key in block.keys if key in width.members):
            total[width.members[key]] += self._model.weights.get(key).double().square().sum()
        return total

    def _advance(self, block: Block, hidden: Hidden, few: int) -> float:
        """Take the states through a block; 1 less the mean cosine of what entered and what leaves (Men et al. 2024)."""
        before = [state.clone() for state in hidden.states[:few]]
        hidden.advance(block.index)
        self._model.drop_block(block.index)
        trim()
        pairs = zip(before, hidden.states, strict=False)
        cosines = [nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).flatten() for a, b in pairs]
        return 1 - float(torch.cat(cosines).mean())


def _readers(width: Width, block: Block) -> list[Matrix]:
    """The matrices of a block whose inputs are things of this width."""
    return [m for m in block.matrices if (m.key, _inputs(m)) in width.axes]


def _inputs(matrix: Matrix) -> int:
    """The dimension, on disk, of a matrix's inputs."""
    return 0 if matrix.transposed else 1


def _last_tokens(hidden: Hidden) -> Tensor:
    """The states of the last token of each row [rows, hidden], float64."""
    return torch.cat([state[:, -1].double().cpu() for state in hidden.states])


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """The mean angle between states, as a share of half a circle (Gromov et al. 2024, arXiv 2403.17887)."""
    cosine = nn.functional.cosine_similarity(one, other, dim=-1).clamp(-1, 1)
    return torch.arccos(cosine).mean() / math.pi
