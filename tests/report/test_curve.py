"""The picture of a training shows its points where they are."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from PIL import Image

from llmshrink.report.curve import HELD, LOSS, axes_of, picture, table, ticks
from llmshrink.report.schema import LossPoint, TrainReport


def trained(losses: dict[int, float], held: dict[int, float], **more: object) -> TrainReport:
    points = [LossPoint(step=step, kind="loss", value=value) for step, value in losses.items()]
    points += [LossPoint(step=step, kind="held", value=value) for step, value in held.items()]
    ends = {"held_before": None, "held_after": None, "tokens_held": 0, "seconds": 1.0, "measure": "kl", **more}
    return TrainReport(teacher="a", steps=100, tokens=1, rows=1, parameters=1, curve=points, **ends)  # type: ignore[arg-type]


def pixels(png: bytes, colour: tuple[int, int, int]) -> np.ndarray:
    """Where the picture has a colour, below its legend: from the left, from the top."""
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    rows, columns = np.nonzero(np.abs(image - colour).sum(-1) < 120)  # of a thin line, half lies between pixels
    return np.stack([columns, rows], axis=1)[rows > 50]


def test_points_lie_where_they_are() -> None:
    losses = {step: 3 - 0.02 * step for step in range(1, 101)}
    report = trained(losses, {50: 2.5}, held_before=2.9, held_after=1.2)
    png = picture(report)
    axes = axes_of([*losses.items(), (0, 2.9)])
    found = pixels(png, LOSS)
    slope, start = np.polyfit(found[:, 0], found[:, 1], 1)
    for step in (10, 90):
        x, y = axes.place(step, losses[step])
        assert slope * x + start == pytest.approx(y, abs=2)
    marked = pixels(png, HELD)
    for step, value in ((0, 2.9), (50, 2.5), (100, 1.2)):
        near = marked[np.abs(marked - axes.place(step, value)).max(1) <= 3]
        assert len(near) > 25  # a dot, not a line


def test_the_table_is_the_same() -> None:
    report = trained({10: 0.5, 20: 0.25}, {20: 0.125}, held_before=1.0, held_after=0.0625)
    rows = list(csv.reader(io.StringIO(table(report))))
    assert rows[0] == ["step", "kind", "value (nats per token)", "of"]
    steps, held = "cross entropy of the text", "KL to the teacher on rows held back"
    assert rows[1:3] == [["10", "loss", "0.5", steps], ["20", "loss", "0.25", steps]]
    assert [row[:3] for row in rows[3:]] == [["0", "held", "1.0"], ["20", "held", "0.125"], ["100", "held", "0.0625"]]
    assert {row[3] for row in rows[3:]} == {held}


@pytest.mark.parametrize("losses", [{}, {1: 2.0}, {1: 2.0, 2: 2.0}, {1: 1e-9, 2: 5e4}])
def test_any_course_can_be_drawn(losses: dict[int, float]) -> None:
    image = Image.open(io.BytesIO(picture(trained(losses, {}))))
    assert image.format == "PNG" and image.size == (960, 540)
    assert len(pixels(picture(trained(losses, {})), LOSS)) >= 20 * bool(losses)


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0.13, 0.31, [0.15, 0.2, 0.25, 0.3]), (-0.5, 0.5, [-0.4, -0.2, 0, 0.2, 0.4])],
)
def test_ticks_are_round(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(found)
