"""What candidates cost in each layer, on the terminal and as a plot."""

from __future__ import annotations

import html
import math

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from llmshrink.report.rows import candidate_words, clean
from llmshrink.report.schema import SensitivityReport, UnitReport

SHOWN = 8  # units at each end
CELL, NAMES, HEAD = (92, 18), 420, 40  # pixels
SCORES = {"kl": "KL to the original, nats/token", "block": "relative squared error of the block"}


def render(report: SensitivityReport) -> Group:
    """The units that suffer most and least from their smallest candidate, and what it costs beside the others."""
    ranked = sorted(report.units, key=_worst, reverse=True)
    middle = len(ranked) - 2 * SHOWN
    shown = ranked if middle <= 0 else [*ranked[:SHOWN], *ranked[-SHOWN:]]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("layers, the most sensitive first", overflow="fold")
    for keys in report.candidates:
        table.add_column(candidate_words(keys), justify="right")
    for i, unit in enumerate(shown):
        if middle > 0 and i == SHOWN:
            table.add_row(Text(f"... {middle} between", style="dim"))
        table.add_row(Text(clean(unit.layers)), *(_cell(unit, c) for c in range(len(report.candidates))))
    what = f"What each candidate costs alone: {SCORES[report.score]}"
    lines: list[RenderableType] = [Text(clean(report.model), style="bold"), Text(what), table]
    for number, keys in enumerate(report.candidates):
        having = [unit for unit in report.units if number in unit.candidates]
        size = sum(unit.bytes[unit.candidates.index(number)] for unit in having)
        total = sum(unit.scores[unit.candidates.index(number)] for unit in having)
        lines.append(Text(f"{candidate_words(keys)} everywhere: {decimal(size)}, costs that add up to {total:.5f}"))
    return Group(*lines, *(Text(clean(event.message), style="yellow") for event in report.events))


def plot(report: SensitivityReport) -> str:
    """A table of cells as SVG: a row for each unit in the model's order, darker where a candidate costs more."""
    scores = [score for unit in report.units for score in unit.scores if score > 0]
    low, high = (math.log(pick(scores)) if scores else 0.0 for pick in (min, max))
    width, height = NAMES + CELL[0] * len(report.candidates), HEAD + CELL[1] * len(report.units)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="4" y="14">{html.escape(SCORES[report.score])}</text>',
    ]
    for column, keys in enumerate(report.candidates):
        words = html.escape(candidate_words(keys))
        parts.append(f'<text x="{NAMES + CELL[0] * column + 4}" y="{HEAD - 6}">{words}</text>')
    for row, unit in enumerate(report.units):
        y = HEAD + CELL[1] * row
        parts.append(f'<text x="4" y="{y + 13}">{html.escape(clean(unit.layers))}</text>')
        for column, score in zip(unit.candidates, unit.scores, strict=True):
            x = NAMES + CELL[0] * column
            depth = (math.log(score) - low) / (high - low) if score > 0 and high > low else 0.0
            shade, ink = int(250 - 210 * depth), "white" if depth > 0.5 else "black"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL[0]}" height="{CELL[1]}" fill="rgb({shade},{shade},255)"/>'
                f'<text x="{x + 4}" y="{y + 13}" fill="{ink}">{score:.2e}</text>'
            )
    return "\n".join([*parts, "</svg>\n"])


def _worst(unit: UnitReport) -> float:
    return unit.scores[unit.bytes.index(min(unit.bytes))]


def _cell(unit: UnitReport, candidate: int) -> str:
    return f"{unit.scores[unit.candidates.index(candidate)]:.2e}" if candidate in unit.candidates else ""


__all__ = ["plot", "render"]
