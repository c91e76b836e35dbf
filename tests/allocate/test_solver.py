"""The solver against an enumeration of all choices."""

from __future__ import annotations

import itertools
import random

import pytest

from llmshrink.allocate.solver import Option, solve


def best(units: list[list[Option]], budget: int) -> float | None:
    """The least sum of scores, by trying everything."""
    totals = [
        (sum(option.bytes for option in chosen), sum(option.score for option in chosen))
        for chosen in itertools.product(*units)
    ]
    return min((score for size, score in totals if size <= budget), default=None)


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_the_best_of_all_choices(seed: int) -> None:
    draw = random.Random(seed)
    scale = 10.0 ** draw.randint(-8, 2)  # costs may be tiny
    step = draw.choice([1, 64, 4096])
    units = [
        [Option(step * draw.randint(1, 60), scale * draw.random()) for _ in range(draw.randint(1, 4))]
        for _ in range(draw.randint(1, 6))
    ]
    least, most = (sum(pick(option.bytes for option in unit) for unit in units) for pick in (min, max))
    for budget in (least - 1, least, (least + most) // 2, most, 2 * most):
        found, expected = solve(units, budget), best(units, budget)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            chosen = [unit[i] for unit, i in zip(units, found, strict=True)]
            assert sum(option.bytes for option in chosen) <= budget
            assert sum(option.score for option in chosen) == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)


def test_what_is_larger_and_no_better_is_never_chosen() -> None:
    assert solve([[Option(1, 0.5), Option(2, 0.5), Option(3, 0.6)]], 10) == [0]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints traces for problems such as this one; standard output is for data."""
    draw = random.Random(1)
    units = []
    for _ in range(192):
        size, cost = draw.choice([4096 * 4096, 4096 * 11008, 4096 * 1024]), draw.lognormvariate(0, 1)
        bits = (2, 2.5, 3, 4, 5, 8)
        units.append([Option(int(size * b / 8), size * cost * 4**-b * draw.uniform(0.8, 1.2)) for b in bits])
    assert solve(units, int(0.5 * sum(unit[-1].bytes for unit in units))) is not None
    assert capfd.readouterr() == ("", "")
