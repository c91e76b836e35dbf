"""How much of each layer goes, found by what its weights are before any of them does.

`owl` is Outlier Weighed Layerwise sparsity (Yin et al. 2024, arXiv 2310.05175): blocks with more weights that stand
out keep more. With A_ij = |W_ij| ||X_j||_2, a block's share of outliers is that of its weights with A_ij > M mean(A),
all its linears taken as one list. These shares are stretched to a range of 2 lambda and shifted so that their mean is
what is to be kept: the paper says "within S - lambda and S + lambda", its authors' code makes a range as wide around a
mean that need not be its middle, and so does this, with the mean over weights. X are the original model's inputs.

`global` drops the smallest of all weights of the model: a matrix gets the share of it that lies below one magnitude.
That is found in two passes, with a histogram of |W| between them whose bins are float32 cut to 11 bits of mantissa: one
for each value of a 16-bit float, and elsewhere 1/2048 of a power of two. Of the bin where the threshold lies, each
matrix drops the same part, so that the sum is exact whatever the bins hold.

`spectrum`, for products of factors, is in `spectrum.py`; `similarity`, for what is tied, in `similarity.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmshrink.calibration.rows import Rows
from llmshrink.engine.gather import gather
from llmshrink.engine.hidden import Hidden
from llmshrink.errors import InputError
from llmshrink.forms import Event
from llmshrink.io.files import sealed, unsealed, write_bytes
from llmshrink.memory import trim
from llmshrink.model.anatomy import Block, Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.choices import Unit
from llmshrink.plan.economy import Economy
from llmshrink.plan.ratios import MOST, Ratios
from llmshrink.progress import Progress
from llmshrink.recipe.ratios import RankSpec, RatioSpec
from llmshrink.report.schema import RatioReport, RatiosReport
from llmshrink.sensitivity.similarity import by_similarity
from llmshrink.sensitivity.spectrum import by_spectrum
from llmshrink.statistics import Norm

FOUND = "ratios.json"  # in the folder of work
CUT = 12  # bits of a float32 that are left out of the histogram of magnitudes
HALVINGS = 64  # of the range in which a shift is looked for: float64 knows no finer one


@dataclass(frozen=True)
class Found:
    """What was found of each unit.

    Attributes:
        shares: Of its weights that go.
        outliers: Share of its weights that stand out; none where nobody asked.
        threshold: The magnitude below which weights go; None: there is none for all.
        alone: Positions of units that share no factor, where they could.
        events: What to tell.
    """

    shares: list[float]
    outliers: list[float] = field(default_factory=list)
    threshold: float | None = None
    alone: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def choose(ratios: Ratios, rows: Rows | None, *, economy: Economy, folder: Path, progress: Progress) -> Found:
    """The share of each unit; a run that goes on keeps to what it found: parts that are done were made so.

    Args:
        ratios: what is open.
        rows: calibration text; None where none is looked at.
        economy: how much is in memory at a time.
        folder: of the run's work, which holds it once it is found.
        progress: told of the steps.
    """
    path = folder / FOUND
    if path.is_file() and (kept := unsealed(path.read_bytes())) is not None:
        return Found(**{**kept, "events": [Event(**event) for event in kept["events"]]})
    # Of its own, because whoever compresses may replace the embedding before any row is embedded.
    model = StreamedModel(ratios.model.source, ratios.model.device)
    hidden = None
    if rows is not None and ratios.needs_data:
        hidden = Hidden(model, rows.batches(economy.batch_tokens), folder=folder if economy.on_disk else None)
    if isinstance(ratios.spec, RankSpec):
        find = by_similarity if ratios.spec.name == "similarity" else by_spectrum
        ranks = find(ratios, model, hidden, economy, progress)
        found = Found(ranks.saved, alone=sorted(ranks.alone), events=ranks.events)
    elif ratios.spec.name == "global":
        found = _by_magnitude(ratios, model, progress)
    else:
        assert hidden is not None
        found = _by_outliers(ratios, ratios.spec, model, hidden, progress)
    write_bytes(path, sealed({**vars(found), "events": [vars(event) for event in found.events]}))
    return found


def told(ratios: Ratios, found: Found) -> RatiosReport:
    """What was found, as the report has it."""
    outliers: Sequence[float | None] = found.outliers or [None] * len(found.shares)
    units = zip(ratios.units, found.shares, outliers, strict=True)
    return RatiosReport(
        name=ratios.spec.name,
        sparsity=ratios.sparsity,
        threshold=found.threshold,
        units=[RatioReport(layers=unit.name, sparsity=share, outliers=seen) for unit, share, seen in units],
    )


# --- outliers


def _by_outliers(ratios: Ratios, spec: RatioSpec, model: StreamedModel, hidden: Hidden, progress: Progress) -> Found:
    blocks = model.anatomy.blocks
    open_ = {unit.matrices[0].key: unit for unit in ratios.units}
    outlying = []
    progress.start("find the sparsity of each block", len(blocks))
    for block in blocks:
        unit = next((open_[m.key] for m in block.matrices if m.key in open_), None)
        model.load_block(block.index)
        if unit is not None:
            outlying.append(_outliers_of(unit, block, model, hidden, spec.threshold))
        hidden.advance(block.index)
        model.drop_block(block.index)
        trim()
        progress.advance(1, f"block {block.index}: {outlying[-1]:.3%} outliers" if unit is not None else "")
    progress.finish()
    shares = by_outliers(outlying, ratios.sizes, ratios.sparsity, spec.spread)
    return _within(ratios, Found(shares, outlying))


def _outliers_of(unit: Unit, block: Block, model: StreamedModel, hidden: Hidden, times: float) -> float:
    """The share of a unit's weights that stand out in a loaded block."""
    wanted = set(unit.matrices)
    groups = [group for group in block.groups if wanted.intersection(group.matrices)]
    gathered = gather(model, block, groups, dict.fromkeys(groups, (Norm,)), hidden)
    norms: dict[Matrix, Tensor] = {}
    for group, found in gathered.items():
        seen = found[Norm]
        assert isinstance(seen, Norm)
        norms |= dict.fromkeys(group.matrices, (seen.square * seen.tokens).sqrt())

    def scores() -> Iterator[Tensor]:
        for matrix in unit.matrices:
            yield model.read(matrix).float().abs() * norms[matrix]

    share = outliers(scores, times)
    if not math.isfinite(share):
        raise InputError(
            f"{unit.name}: on the calibration text its inputs are infinite or undefined.",
            hint="Leave out `ratios`, or calibrate on other text.",
        )
    return share


def outliers(scores: Callable[[], Iterable[Tensor]], times: float) -> float:
    """The share of scores that are larger than `times` their mean; NaN where they have none.

    Args:
        scores: gives all of them, in tensors of any shape, twice: they need not be in memory together.
        times: the mean of all.
    """
    total, count = 0.0, 0
    for score in scores():
        total += float(score.sum(dtype=torch.float64))
        count += score.numel()
    edge = times * total / count
    return sum(int((score > edge).sum()) for score in scores()) / count if math.isfinite(edge) else math.nan


def by_outliers(outlying: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """The sparsity of each block, from the shares of its weights that stand out.

    Args:
        outlying: share of outliers in each.
        sizes: weights of each.
        sparsity: mean of the result over all weights.
        spread: half of the difference between the largest and the smallest; they are equal where all outliers are.
    """
    low, range_ = min(outlying), max(outlying) - min(outlying)
    more = [2 * spread * (share - low) / range_ if range_ else 0.0 for share in outlying]
    mean = _mean(more, sizes)
    return [sparsity + mean - each for each in more]


# --- magnitudes


def _by_magnitude(ratios: Ratios, model: StreamedModel, progress: Progress) -> Found:
    progress.start("find the sparsity of each matrix", 2 * len(ratios.units))
    counts = torch.zeros(1 << 31 - CUT, dtype=torch.int64, device=model.device)

    def passed(unit: Unit) -> Tensor:
        progress.advance(1, unit.name)
        return sum((histogram(model.read(m)) for m in unit.matrices), torch.zeros_like(counts))

    for unit in ratios.units:
        counts += passed(unit)
    place, part = edge_of(counts, ratios.sparsity * sum(ratios.sizes))
    shares = []
    for unit, size in zip(ratios.units, ratios.sizes, strict=True):
        own = passed(unit)
        shares.append((int(own[:place].sum()) + part * int(own[place])) / size)
    progress.finish()
    threshold = float(torch.tensor(place << CUT, dtype=torch.int32).view(torch.float32))
    return _within(ratios, Found(shares, threshold=threshold))


def histogram(weight: Tensor) -> Tensor:
    """How many magnitudes of a tensor lie in each bin: int64 [2^(31 - CUT)], bins in their order."""
    magnitudes = weight.float().abs().flatten()
    return torch.bincount(magnitudes.view(torch.int32) >> CUT, minlength=1 << 31 - CUT)


def edge_of(counts: Tensor, drop: float) -> tuple[int, float]:
    """The bin in which the threshold lies that drops so many, and the part of it that goes."""
    total = counts.cumsum(0)
    place = min(int((total < drop).sum()), len(counts) - 1)
    inside = int(counts[place])
    return place, (drop - int(total[place]) + inside) / inside if inside else 0.0


# --- what a layer can bear


def _within(ratios: Ratios, found: Found) -> Found:
    """The same with no share below none or above `MOST`; told where that changes any."""
    shares = bounded(found.shares, ratios.sizes, MOST)
    moved = [unit.name for unit, share in zip(ratios.units, found.shares, strict=True) if not 0 <= share <= MOST]
    if not moved:
        return found
    message = f"{len(moved)} of {len(shares)} shares were not within 0 and {MOST:g}: the others make up for it"
    return Found(shares, found.outliers, events=[*found.events, Event("ratios_bounded", message, moved[0])])


def bounded(shares: Sequence[float], sizes: Sequence[int], most: float) -> list[float]:
    """Shares from 0 to `most` with the same mean: all are moved by one number, and cut where they leave that range.

    Args:
        shares: of each; their mean must lie within the range.
        sizes: weights of each.
        most: the largest share.
    """
    if all(0 <= share <= most for share in shares):
        return list(shares)
    mean, low, high = _mean(shares, sizes), -max(shares), most - min(shares)

    def moved(by: float) -> list[float]:
        return [min(max(share + by, 0.0), most) for share in shares]

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean(moved(middle), sizes) < mean else (low, middle)
    return moved(high)


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)
