"""A recipe made small, to see in seconds whether it goes through."""

from __future__ import annotations

import json
from pathlib import Path

from llmshrink import patterns
from llmshrink.demo import NAME
from llmshrink.plan.work import Work
from llmshrink.recipe.schema import Recipe

ROWS, LENGTH, STEPS = 8, 64, 2


def smoke_recipe(recipe: Recipe, work: Work, last: int, source: Path, output: Path) -> Recipe:
    """The same recipe on the truncated model: few short rows, nothing measured or gated, no other block's patterns."""
    cut = {m for block in work.model.anatomy.blocks[last + 1 :] for m in block.matrices}
    names = [m.name for m in work.model.anatomy.matrices if m not in cut]
    data = json.loads(recipe.model_dump_json())
    for stage in data["stages"]:
        stage["gate"] = {}
        if stage["task"] in ("quantize", "prune", "cluster", "factorize"):
            stage["layers"] = {p: v for p, v in stage["layers"].items() if any(patterns.matches(p, n) for n in names)}
            if stage["allocate"] is not None:
                stage["allocate"] |= {"size": None, "bpw": None, "rows": STEPS, "length": LENGTH}
            if stage["reconstruct"] is not None:
                stage["reconstruct"]["steps"] = STEPS
            tune = None if work.tune is None else work.tune.model_copy(update={"steps": STEPS})
            stage["tune"] = tune and tune.model_dump()
            stage["ignore"] = [p for p in stage["ignore"] if any(patterns.matches(p, n) for n in names)]
    calibration = {**data["calibration"], "samples": ROWS, "length": LENGTH}
    if calibration["data"] == "auto" and recipe.model.id in (None, NAME):
        calibration["data"] = "generator"
    run = {**data["run"], "strict": False}
    return recipe.model_validate(
        {
            **data,
            "model": {"id": str(source)},
            "calibration": calibration,
            "evaluation": {**data["evaluation"], "data": [], "speed": False},
            "run": run,
            "output": str(output),
        }
    )
