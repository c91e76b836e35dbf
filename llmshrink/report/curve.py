"""The course of a training as a picture, and its numbers as a table."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from llmshrink.report.schema import TrainReport

WIDTH, HEIGHT = 960, 540  # pixels
LEFT, TOP, RIGHT, BOTTOM = 80, 60, 24, 60  # of these, around what is drawn
SMOOTH = 2  # drawn so much larger, then made smaller: edges become soft
TICKS = 6  # about so many on each axis
INK, GRID = (60, 60, 60), (225, 225, 225)
LOSS, HELD = (31, 119, 180), (230, 85, 13)
TOKEN, ROW = "nats per token", "nats per row"

Points = list[tuple[float, float]]  # step, value


@dataclass(frozen=True)
class Axes:
    """Where a step and a value lie in the picture, in its pixels."""

    steps: tuple[float, float]
    values: tuple[float, float]

    def place(self, step: float, value: float) -> tuple[float, float]:
        """From the left, and from the top."""
        across = (step - self.steps[0]) / (self.steps[1] - self.steps[0])
        up = (value - self.values[0]) / (self.values[1] - self.values[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def table(trained: TrainReport) -> str:
    """Every point as CSV: step, kind, value, and what that is of."""
    out = io.StringIO()
    rows, of = csv.writer(out, lineterminator="\n"), {"loss": trained.loss, "held": _held(trained)}
    rows.writerow(("step", "kind", f"value ({_unit(trained)})", "of"))
    rows.writerows((step, kind, value, of[kind]) for kind, points in _series(trained).items() for step, value in points)
    return out.getvalue()


def _held(trained: TrainReport) -> str:
    return f"{'KL to the teacher' if trained.measure == 'kl' else 'loss'} on rows held back"


def picture(trained: TrainReport) -> bytes:
    """The loss of the steps and what was measured of the rows held back, as PNG."""
    series = _series(trained)
    axes = axes_of([point for points in series.values() for point in points])
    image = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), "white")
    draw = _Pen(ImageDraw.Draw(image))
    _frame(draw, axes)
    draw.line([axes.place(*point) for point in series["loss"]], LOSS)
    held = [axes.place(*point) for point in series["held"]]
    draw.line(held, HELD)
    for place in held:
        draw.dot(place, HELD)
    draw.text((LEFT, 10), f"of the steps: {trained.loss}", LOSS)
    draw.text((LEFT, 32), _held(trained), HELD if held else GRID)
    draw.text((WIDTH - RIGHT, 10), _unit(trained), INK, "ra")
    out = io.BytesIO()
    image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(out, "PNG")
    return out.getvalue()


def _unit(trained: TrainReport) -> str:
    """Of what a loss is the mean."""
    return ROW if trained.text is not None and trained.text.kind == "classes" else TOKEN


def axes_of(points: Points) -> Axes:
    """Axes on which all points lie; one alone, or none, too."""
    steps = [step for step, _ in points] or [0.0]
    values = [value for _, value in points] or [0.0]
    room = 0.04 * (max(values) - min(values)) or 0.5
    return Axes((min(0.0, *steps), max(1.0, *steps)), (min(values) - room, max(values) + room))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _series(trained: TrainReport) -> dict[str, Points]:
    """What the report says, with what was measured before the first step and after the last."""
    found: dict[str, Points] = {"loss": [], "held": []}
    for point in trained.curve:
        found[point.kind].append((point.step, point.value))
    last = trained.steps if not trained.rounds else max((point.step for point in trained.curve), default=trained.steps)
    ends = {0: trained.held_before, last: trained.held_after}
    held = {step: value for step, value in ends.items() if value is not None} | dict(found["held"])
    return found | {"held": sorted(held.items())}


def _frame(draw: _Pen, axes: Axes) -> None:
    for step in ticks(*axes.steps):
        if step == int(step):
            x, y = axes.place(step, axes.values[0])
            draw.line([(x, y), axes.place(step, axes.values[1])], GRID, 1)
            draw.text((x, y + 8), f"{step:,.0f}", INK, "ma")
    for value in ticks(*axes.values):
        x, y = axes.place(axes.steps[0], value)
        draw.line([(x, y), axes.place(axes.steps[1], value)], GRID, 1)
        draw.text((x - 8, y), f"{value:.4g}", INK, "rm")
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 28), "step of gradient", INK, "ma")


class _Pen:
    """Draws in pixels of the picture as it will be."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self._draw, self._font = draw, ImageFont.load_default(16 * SMOOTH)

    def line(self, places: Points, colour: tuple[int, int, int], width: int = 2) -> None:
        if len(places) > 1:
            self._draw.line([(SMOOTH * x, SMOOTH * y) for x, y in places], colour, width * SMOOTH, joint="curve")
        for place in places if len(places) == 1 else []:
            self.dot(place, colour)

    def dot(self, place: tuple[float, float], colour: tuple[int, int, int]) -> None:
        self._draw.circle((SMOOTH * place[0], SMOOTH * place[1]), 5 * SMOOTH, colour)

    def text(self, place: tuple[float, float], words: str, colour: tuple[int, int, int], anchor: str = "la") -> None:
        self._draw.text((SMOOTH * place[0], SMOOTH * place[1]), words, colour, self._font, anchor)


__all__ = ["Axes", "axes_of", "picture", "table", "ticks"]
