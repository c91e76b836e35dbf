"""What cutting whole parts out of a model costs: each way of it, with and without repair, one line each.

    python -m bench.cuts ../shared/models/lab8m ../shared/data

Needs llmshrink alone. All cuts of a group leave (nearly) the same number of parameters. KL to the original on three
texts, 64 rows of 256 tokens each; calibrated on 128 rows of another text.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXTS = ("tinystories", "gsm8k", "wikitext2")
LAYERS = ("influence", "angular", "divergence")
PLAIN = {"repair": "false", "criterion": "magnitude"}
GROUPS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "neurons 496 of 768": [
        ("magnitude", {"neurons": "496", **PLAIN}),
        *((c, {"neurons": "496", "criterion": c, "repair": "false"}) for c in ("activation", "fluctuation", "wanda")),
        ("obs", {"neurons": "496", "repair": "false"}),
        ("magnitude, repaired", {"neurons": "496", "criterion": "magnitude"}),
        ("wanda, repaired", {"neurons": "496", "criterion": "wanda"}),
        ("obs, repaired", {"neurons": "496"}),
    ],
    "layers 6 of 8": [
        *((c, {"layers": "6", "layer_criterion": c, "repair": "false"}) for c in LAYERS),
        *((f"{c}, repaired", {"layers": "6", "layer_criterion": c}) for c in LAYERS),
        ("search, repaired", {"layers": "6"}),
    ],
    "hidden 208 of 256": [("sliced", {"hidden": "208", "repair": "false"}), ("repaired", {"hidden": "208"})],
    "heads 4 of 8": [("sliced", {"heads": "4", "repair": "false"}), ("repaired", {"heads": "4"})],
    "params 80%": [("search", {"params": "80%"})],
}


def run(model: Path, data: Path, cut: dict[str, str], out: Path) -> tuple[list[float], int, float, float]:
    """KL on each text, parameters, seconds of the compress step and of the whole process."""
    command = [sys.executable, "-m", "llmshrink", "prune", str(model), "-o", str(out), "--quiet"]
    command += [part for key, value in cut.items() for part in ("--set", f"cut.{key}={value}")]
    command += ["--calibration", str(data / "calibration.json"), "--samples", "128", "--length", "256"]
    command += [part for text in TEXTS for part in ("--evaluation", str(data / f"{text}.json"))]
    command += ["--set", "evaluation.rows=64", "--set", "evaluation.length=256", "--set", "evaluation.speed=false"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    process = time.perf_counter() - start
    report = json.loads((out / "report.json").read_text())
    (stage, *_) = report["stages"]
    kl = [score["kl"] for score in report["after"]["scores"]]
    return kl, stage["cut"]["candidates"][0]["parameters"], stage["seconds"]["compress_stage"], process


def main() -> None:
    """Print the table."""
    model, data = (Path(argument).resolve() for argument in sys.argv[1:3])
    for group, cuts in GROUPS.items():
        print(group, flush=True)
        for name, cut in cuts:
            with tempfile.TemporaryDirectory() as folder:
                kl, parameters, seconds, process = run(model, data, cut, Path(folder) / "out")
            shown = " ".join(f"{value:.4f}" for value in kl)
            print(f"  {name:22} KL {shown}  {parameters:,} parameters  {seconds:.0f} s ({process:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
