"""From what may be cut out of a model to what is: searched, kept for a run that goes on, told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmshrink.calibration.rows import Rows
from llmshrink.forms import Event
from llmshrink.io.files import sealed, unsealed, write_bytes
from llmshrink.model.widths import Chosen
from llmshrink.plan.cut import Cuts
from llmshrink.plan.economy import Economy
from llmshrink.plan.work import Work
from llmshrink.progress import Progress
from llmshrink.report.schema import CandidateReport, CutReport
from llmshrink.sensitivity.search import Search, Tried

CHOSEN = "cut.json"  # in the folder of work


def choose(
    cuts: Cuts, rows: Rows | None, *, economy: Economy, folder: Path, progress: Progress
) -> tuple[list[Tried], list[Event]]:
    """All that was tried, the chosen one first, and what to tell of it.

    A run that goes on keeps to what it chose: parts are done so.

    Args:
        cuts: what is open.
        rows: calibration text; None: nothing is measured.
        economy: how much is in memory at a time.
        folder: of the run's work, which holds it once it is found.
        progress: told of the steps.
    """
    path = folder / CHOSEN
    if path.is_file() and (kept := unsealed(path.read_bytes())) is not None:
        return [_tried(one) for one in kept["tried"]], [Event(**event) for event in kept["events"]]
    search = Search(cuts, rows if cuts.needs_data else None, economy=economy, folder=folder, progress=progress)
    found = search.run()
    write_bytes(path, sealed({"tried": [_plain(one) for one in found], "events": [vars(e) for e in search.events]}))
    return found, search.events


def told(cuts: Cuts, tried: list[Tried], work: Work) -> CutReport:
    """What was chosen among what, as the report has it."""
    return CutReport(
        before=cuts.sizes(),
        criteria={name: _criterion(cuts, name) for name in cuts.widths},
        repaired=0 if work.repair is None else len(work.repair.matrices),
        candidates=[
            CandidateReport(
                kept=cuts.sizes_of(one.chosen),
                layers=list(one.chosen.blocks),
                found_by=one.why,
                parameters=cuts.parameters(one.chosen),
                cost=one.cost,
            )
            for one in tried
        ],
    )


def _criterion(cuts: Cuts, name: str) -> str:
    """By what the things of a width are ranked."""
    if name == "hidden":
        return "activation"
    asked = cuts.spec.criterion
    return "reap" if name == "experts" and asked != "magnitude" else asked


def _plain(one: Tried) -> dict[str, Any]:
    chosen = one.chosen
    return {
        "blocks": list(chosen.blocks),
        "inside": {name: [index.tolist() for index in found] for name, found in chosen.inside.items()},
        "channels": None if chosen.channels is None else chosen.channels.tolist(),
        "why": one.why,
        "cost": one.cost,
    }


def _tried(kept: dict[str, Any]) -> Tried:
    inside = {name: tuple(torch.tensor(index) for index in found) for name, found in kept["inside"].items()}
    channels = None if kept["channels"] is None else torch.tensor(kept["channels"])
    return Tried(Chosen(tuple(kept["blocks"]), inside, channels), kept["why"], kept["cost"])
