"""Which few values stand for many numbers best: weighted k-means in one dimension, solved exactly.

The best clusters of numbers on a line are stretches of them in order, so the least cost of k stretches over the first j
numbers is D_k(j) = min_i D_{k-1}(i) + c(i, j), where c is what the stretch from i to j costs (Wang and Song 2011,
Ckmeans.1d.dp). As c is a Monge matrix, the best i never falls when j grows: once it is known for every other j, the
rest lies between neighbours, and each layer of the table takes O(n log n) (Grønlund et al. 2017, arXiv 1701.07204). All
of a level's j, and all groups of numbers, are looked at together here.

Numbers that are equal are one number with their weights added up. Of a large group of bfloat16 that leaves a few
thousand: there are no more than 65 536, and most of them are far out. Where these are still many, they are first solved
with the ends of stretches at the edges of bins only; then, exactly again, with each end within a few steps of where it
was, the steps half as long each time, down to single numbers. Nothing proves that this is the optimum; it nearly always
was (how often, and by how much it was not, is in bench/results.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

NUMBERS = 1 << 16  # whose tables are looked for at a time, at least those of one table
CELLS = 1 << 17  # costs that are in memory at a time
EXACT = 64  # numbers of which all ends are tried
DENSE = 512  # places whose stretches all are weighed at once
REACH = 8  # steps that an end may go at a time
PATTERNS = 1 << 16  # of the bits of a bfloat16
MANY = PATTERNS  # numbers that are counted by their patterns
BINS, ONE = (8,), (14, 23)  # for each stretch, between whose edges ends lie at first; several are tried of one group
EDGES = 1024  # of bins at most, but for four to a stretch
TURNS = 32  # of moving ends at most
SMALLEST = 1e-12  # of a group's mean weight: what numbers without any weight get, so that they are near something


def centroids(values: Tensor, weights: Tensor | None, count: int) -> Tensor:
    """The `count` values that stand best for each row of numbers, in rising order.

    Args:
        values: float32 [groups, n], finite.
        weights: float32 [groups, n], not negative: what the square of an error counts; None: all equal.
        count: of values; where a row has fewer different numbers, some occur more than once.

    Returns:
        float32 [groups, count]; the sum of weighted squared distances to the nearest is the least possible, or where
        there are many numbers nearly so.
    """
    found = []
    size = max(1, NUMBERS // values.shape[1])
    for part in range(0, len(values), size):
        rows = slice(part, part + size)
        order, mass = _merged(values[rows], None if weights is None else weights[rows])
        found.append(_solved(order, mass, count, alone=len(values) == 1))
    return torch.cat(found)


def cost(values: Tensor, weights: Tensor | None, table: Tensor) -> Tensor:
    """The sum of weighted squared distances of each row of numbers to the nearest of its values [groups], float64."""
    near = table.gather(1, nearest(values, table))
    square = (values.double() - near.double()).square()
    return (square if weights is None else square * weights).sum(1)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest of `table` [groups, count], which rises, for each of `values` [groups, n]: int64."""
    return torch.searchsorted(middles(table), values.contiguous())


def middles(table: Tensor) -> Tensor:
    """Where one of two neighbours in a table [groups, count], which rises, stops being the nearest: [.., count - 1]."""
    return ((table[:, 1:] + table[:, :-1]) / 2).contiguous()


def _merged(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Different numbers of each row in rising order, and their weights added up; float64, padded with the last one."""
    if len(values) == 1 and values.shape[1] > MANY:
        pattern = values[0].contiguous().view(torch.int32)
        if not int(pattern.bitwise_and(PATTERNS - 1).count_nonzero()):  # bfloat16: the upper half of a float32
            return _counted((pattern >> 16).bitwise_and_(PATTERNS - 1), None if weights is None else weights[0])
    order = values.argsort(1)
    sorted_ = values.gather(1, order).double()
    mass = torch.ones_like(sorted_) if weights is None else weights.gather(1, order).double()
    mass = mass + (SMALLEST * mass.mean(1, keepdim=True)).clamp(min=torch.finfo(torch.float64).tiny)
    new = torch.cat([torch.zeros_like(order[:, :1]), (sorted_[:, 1:] != sorted_[:, :-1]).long()], 1).cumsum(1)
    width = int(new[:, -1].max()) + 1
    total = torch.zeros(len(values), width, dtype=torch.float64, device=values.device).scatter_add_(1, new, mass)
    merged = sorted_[:, -1:].expand(-1, width).clone().scatter_(1, new, sorted_)
    return merged, total


def _counted(patterns: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of many bfloat16 numbers [n], given by their 16 bits as int32: nothing is sorted but what there is."""
    count = torch.bincount(patterns, minlength=PATTERNS)
    there = count.nonzero()[:, 0]
    mass = count.double() if weights is None else torch.bincount(patterns, weights.double(), PATTERNS)
    numbers = there.to(torch.int16).view(torch.bfloat16).double()
    numbers, order = numbers.sort()
    mass = mass[there][order] + (SMALLEST * mass.sum() / len(patterns)).clamp(min=torch.finfo(torch.float64).tiny)
    return numbers[None], mass[None]


def _solved(values: Tensor, mass: Tensor, count: int, *, alone: bool) -> Tensor:
    """The centroids of rows of rising numbers [groups, n] under their masses, which are zero from some number on."""
    groups, n = values.shape
    centre = (values * mass).sum(1, keepdim=True) / mass.sum(1, keepdim=True)  # sums of squares lose less around it
    shifted = values - centre
    sums = [torch.nn.functional.pad(mass * shifted**power, (1, 0)).cumsum(1) for power in (0, 1, 2)]
    count_there = min(count, n)
    if n <= max(EXACT, 2 * BINS[0] * count):
        bounds = _bounds(sums, count_there)
    else:
        tried = [
            _moved(sums, _between_bins(sums, shifted, mass, bins, count_there)) for bins in (ONE if alone else BINS)
        ]
        bounds = _cheapest(sums, tried)
    zeroth, first = (one.gather(1, bounds).diff(dim=1) for one in sums[:2])
    found = first / zeroth
    kept = zeroth > 0  # stretches without numbers repeat the one before, or the first that has some
    first_kept = kept.int().argmax(1, keepdim=True)
    index = torch.arange(found.shape[1], device=values.device).expand_as(found).where(kept, 0).cummax(1).values
    index = torch.maximum(index, first_kept)
    found = found.gather(1, index) + centre
    return torch.nn.functional.pad(found[None], (0, count - found.shape[1]), mode="replicate")[0].float()


def _cheapest(sums: list[Tensor], tried: list[Tensor]) -> Tensor:
    """Of several ends of stretches [groups, count + 1], for each group those that cost least."""
    best, *others = tried
    for other in others:
        costs = []
        for bounds in (best, other):
            at = [one.gather(1, bounds) for one in sums]
            costs.append(_costs(*[(one[:, :-1], one[:, 1:]) for one in at]).sum(1, keepdim=True))
        best = torch.where(costs[1] < costs[0], other, best)
    return best


def _bounds(sums: list[Tensor], count: int) -> Tensor:
    """Where the best stretches begin and end among the places of the sums [groups, n + 1]: [groups, count + 1]."""
    places = sums[0].shape[1]
    if places > DENSE:
        layers = _table(sums, count)
    else:
        size = max(1, CELLS // places**2)
        parts = [_dense([one[part : part + size] for one in sums], count) for part in range(0, len(sums[0]), size)]
        layers = [torch.cat(same) for same in zip(*parts, strict=True)]
    last = torch.full((len(sums[0]),), places - 1, dtype=torch.long, device=sums[0].device)
    ends = [last]
    for layer in reversed(layers):
        ends.append(layer.gather(1, ends[-1][:, None])[:, 0].long())
    return torch.stack(ends[::-1], 1)


def _dense(sums: list[Tensor], count: int) -> list[Tensor]:
    """What `_table` finds, with the costs of all stretches in memory."""
    costs = _costs(*[(one[:, None], one[:, :, None]) for one in sums])  # [groups, ends, begins]
    places = costs.shape[1]
    costs.masked_fill_(torch.ones(places, places, dtype=torch.bool, device=costs.device).triu(1), torch.inf)
    best = costs[:, :, 0]
    layers = [torch.zeros_like(best, dtype=torch.int32)]
    for _ in range(count - 1):
        best, begin = (costs + best[:, None]).min(2)
        layers.append(begin.int())
    return layers


def _costs(zeroth: Pair, first: Pair, second: Pair) -> Tensor:
    """What stretches cost whose ends have these sums; a pair broadcasts."""
    mass = (zeroth[1] - zeroth[0]).clamp_(min=torch.finfo(torch.float64).tiny)
    return (second[1] - second[0]).sub_((first[1] - first[0]).square_().div_(mass))


def _between_bins(sums: list[Tensor], values: Tensor, mass: Tensor, bins: int, count: int) -> tuple[Tensor, Tensor]:
    """The best stretches that end at edges of bins, as places [groups, count + 1], and how wide the bins around are.

    Each holds as much of density^(1/3), which is how many values of the best table lie there (Panter and Dite 1951).
    """
    bins = count * min(bins, max(4, EDGES // count))
    gaps = values.diff(dim=1, prepend=values[:, :1])
    share = (mass * gaps.square()).pow(1 / 3).cumsum(1)
    total = share[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    wanted = torch.arange(1, bins, device=values.device, dtype=torch.float64) / bins
    edges = torch.searchsorted(share.contiguous(), (total * wanted).contiguous())
    edges = torch.nn.functional.pad(edges, (1, 0))
    edges = torch.cat([edges, (mass > 0).sum(1, keepdim=True)], 1)  # behind the last number, wherever others end
    picked = _bounds([one.gather(1, edges) for one in sums], count)
    around = [edges.gather(1, (picked + step).clamp(0, bins)) for step in (-1, 0, 1)]
    return around[1], torch.maximum(around[2] - around[1], around[1] - around[0])


def _moved(sums: list[Tensor], found: tuple[Tensor, Tensor]) -> Tensor:
    """The best stretches whose ends lie near where they were, in steps that get smaller down to single numbers."""
    bounds, widths = found
    steps = -(-widths // REACH)
    todo = torch.arange(len(bounds), device=bounds.device)
    for _ in range(TURNS):
        cells = bounds.shape[1] * (2 * REACH + 1) ** 2
        parts = [
            _within([one[part] for one in sums], bounds[part], steps[part])
            for part in torch.split(todo, max(1, CELLS // cells))
        ]
        bounds[todo] = torch.cat([moved for moved, _ in parts])
        far = torch.cat([edge for _, edge in parts])
        kept = far | (steps[todo] > 1).any(1)
        steps[todo] = torch.where(far[:, None], steps[todo], -(-steps[todo] // 2))
        todo = todo[kept]
        if not len(todo):
            break
    return bounds


def _within(sums: list[Tensor], bounds: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The best stretches whose inner ends lie few steps from `bounds` [groups, stretches + 1], and who went farthest.

    Args:
        sums: [groups, n + 1].
        bounds: where stretches begin and end.
        steps: how far apart the places are that each end may go to [groups, stretches + 1].
    """
    n, (groups, ends) = sums[0].shape[1] - 1, bounds.shape
    inner = torch.ones(ends, dtype=torch.long, device=bounds.device)
    inner[0] = inner[-1] = 0
    offsets = torch.arange(-REACH, REACH + 1, device=bounds.device)
    places = (bounds[:, :, None] + (steps * inner)[:, :, None] * offsets).clamp_(0, n)
    at = [one.gather(1, places.view(groups, -1)).view(places.shape) for one in sums]
    costs = _costs(*[(one[:, :-1, None], one[:, 1:, :, None]) for one in at])  # [groups, stretches, ends, begins]
    costs.masked_fill_(places[:, :-1, None] > places[:, 1:, :, None], torch.inf)
    best, begins = costs.new_zeros(groups, 2 * REACH + 1), []
    for stretch in costs.unbind(1):
        best, begin = (stretch + best[:, None]).min(2)
        begins.append(begin)
    index = torch.full((groups, 1), REACH, device=bounds.device)
    picked = [index]
    for begin in reversed(begins):
        index = begin.gather(1, index)
        picked.append(index)
    chosen = torch.cat(picked[::-1], 1)
    far = ((chosen == 0) | (chosen == 2 * REACH))[:, 1:-1].any(1)
    return places.gather(2, chosen[:, :, None])[:, :, 0], far


def _table(sums: list[Tensor], count: int) -> list[Tensor]:
    """For each number of stretches, and each j, where the last of them begins: int32 [groups, n + 1]."""
    zeroth, first, second = sums
    groups, places = zeroth.shape
    best = second - first.square() / zeroth.clamp(min=torch.finfo(torch.float64).tiny)  # of one stretch
    layers = [torch.zeros(groups, places, dtype=torch.int32, device=zeroth.device)]
    for number in range(2, count + 1):
        best, begin = _layer(best - second, sums, number)
        layers.append(begin)
    return layers


def _layer(base: Tensor, sums: list[Tensor], number: int) -> tuple[Tensor, Tensor]:
    """The least costs of `number` stretches [groups, n + 1], and where the last of them begins.

    `base` is that of one stretch less, without the squares of what it covers.
    """
    zeroth, first, second = sums
    groups, places = base.shape
    device, last = base.device, places - 1
    begin = torch.full((groups, places), number - 1, dtype=torch.long, device=device)
    best = torch.full_like(base, torch.inf)
    best[:, : number - 1] = 0.0  # nothing is left to be split
    stride = 1 << last.bit_length() - 1
    offset = torch.arange(groups, device=device)[:, None] * places
    flat = [one.flatten() for one in (base, first, zeroth)]
    while stride:
        ends = torch.arange(stride, places, 2 * stride, device=device)
        ends = ends[ends >= number]
        if len(ends):
            low = begin[:, ends - stride].clamp(min=number - 1)
            beyond = ends + stride
            high = begin[:, beyond.clamp(max=last)].where(beyond <= last, torch.tensor(last, device=device))
            high = torch.minimum(high.where(high >= low, ends - 1), ends - 1)
            low = torch.minimum(low, high)
            cheapest, where = _searched(flat, (first[:, ends], zeroth[:, ends]), low, high, offset)
            best[:, ends] = cheapest + second[:, ends]
            begin[:, ends] = where
        stride //= 2
    return best, begin.int()


def _searched(
    flat: list[Tensor], at: tuple[Tensor, Tensor], low: Tensor, high: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """The least cost and its place, each [groups, ends], among the places from `low` to `high`."""
    lengths = (high - low + 1).flatten()
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=low.device), lengths)
    begin = ((low + offset).flatten() - starts[:-1])[owner] + torch.arange(len(owner), device=low.device)
    base, first, zeroth = (one[begin] for one in flat)
    spread = (at[0].flatten()[owner] - first).square_()
    costs = base.sub_(spread.div_((at[1].flatten()[owner] - zeroth).clamp_(min=torch.finfo(torch.float64).tiny)))
    cheapest = torch.segment_reduce(costs, "min", lengths=lengths)
    hits = (costs == cheapest[owner]).nonzero()[:, 0]
    place = torch.full_like(lengths, len(costs)).scatter_reduce_(0, owner[hits], hits, "amin")
    return cheapest.view_as(low), (begin[place] - offset.expand_as(low).flatten()).view_as(low)
