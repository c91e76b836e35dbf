"""One option for each unit, so that all together cost least within a budget: solved exactly.

This is the multiple-choice knapsack (Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, chapter 11), given to HiGHS
as a mixed-integer program. Nothing here knows what a unit is: layers and their bits, or anything else with a price.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

LARGE = 1e6


@dataclass(frozen=True)
class Option:
    """One thing that a unit can get."""

    bytes: int
    score: float  # what it costs in quality; the sum over all units is made least


def solve(units: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Choose one option of each unit.

    Args:
        units: the options of each, one at least.
        budget: bytes that the chosen ones may have together.

    Returns:
        For each unit the position of its option; None where not even the smallest keep within the budget.
    """
    kept = [_efficient(options) for options in units]
    least = [min(options[i].bytes for i in indices) for options, indices in zip(units, kept, strict=True)]
    if sum(least) > budget:
        return None
    sizes = [[options[i].bytes - low for i in kept] for options, kept, low in zip(units, kept, least, strict=True)]
    best = [min(options[i].score for i in indices) for options, indices in zip(units, kept, strict=True)]
    costs = [[options[i].score - low for i in kept] for options, kept, low in zip(units, kept, best, strict=True)]
    chosen = _milp(sizes, costs, budget - sum(least))
    return [indices[i] for indices, i in zip(kept, chosen, strict=True)]


def _efficient(options: Sequence[Option]) -> list[int]:
    """Those than which no smaller one is as good, from the smallest to the largest."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].score)):
        if not kept or options[i].score < options[kept[-1]].score:
            kept.append(i)
    return kept


def _milp(sizes: list[list[int]], costs: list[list[float]], budget: int) -> list[int]:
    """The same for sizes and costs that both begin at zero in each unit."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if sum(unit[-1] for unit in sizes) <= budget:  # the last of each is its best
        return [len(unit) - 1 for unit in sizes]
    step = math.gcd(*(size for unit in sizes for size in unit))  # small whole numbers are added without rounding
    flat_sizes = np.array([size // step for unit in sizes for size in unit], dtype=float)
    flat_costs = np.array([cost for unit in costs for cost in unit])
    owner = np.repeat(np.arange(len(sizes)), [len(unit) for unit in sizes])
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    within = LinearConstraint(flat_sizes[None, :], -np.inf, budget // step)
    with _no_stdout():
        found = milp(
            flat_costs * (LARGE / flat_costs.sum()),
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), within],
            options={"mip_rel_gap": 0.0},
        )
    assert found.x is not None, found.message  # the smallest of all fit, so there is a solution
    ends = np.cumsum([len(unit) for unit in sizes])
    chosen = [int(part.argmax()) for part in np.split(found.x, ends[:-1])]
    assert sum(unit[i] for unit, i in zip(sizes, chosen, strict=True)) <= budget
    return chosen


@contextmanager
def _no_stdout() -> Iterator[None]:
    """HiGHS 1.12 prints traces of its own for some problems, whatever it is told; standard output is for data."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
