"""KL over time for every tool, one panel for each setting: what `bench.peers --json FILE` kept.

python -m bench.plot FILE bench/peers.svg          (needs matplotlib, which nothing else here does)
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "llmshrink"  # the same bytes for the same numbers

SETTINGS = {"4:128": "4 bits, groups of 128", "3:128": "3 bits, groups of 128", "2:64": "2 bits, groups of 64"}
OURS = {"fast", "balanced", "best"}


def draw(axes: Any, setting: str, tools: dict[str, Any]) -> None:
    """One setting: a mark for each tool at its median seconds and its mean KL over the texts."""
    for tool, facts in tools.items():
        seconds, kl = statistics.median(t["seconds"] for t in facts["times"]), statistics.mean(facts["kl"])
        ours = tool in OURS
        axes.scatter(seconds, kl, s=60, marker="D" if ours else "o", color="tab:red" if ours else "tab:gray")
        name = f"llmshrink {tool}" if ours else tool
        axes.annotate(name, (seconds, kl), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8)
    axes.set(xscale="log", yscale="log", title=SETTINGS.get(setting, setting), xlabel="seconds of work, 2 cores")
    axes.margins(0.25)


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kept", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    found = json.loads(args.kept.read_text())
    settings = found["settings"]
    figure, panels = plt.subplots(1, len(settings), figsize=(4 * len(settings), 3.6), squeeze=False)
    for axes, (setting, tools) in zip(panels[0], settings.items(), strict=True):
        draw(axes, setting, tools)
    panels[0][0].set_ylabel(
        f"KL to the original, nats per token\n({found['model']}, mean of {len(found['texts'])} texts)"
    )
    figure.tight_layout()
    figure.savefig(args.figure, metadata={"Date": None})


if __name__ == "__main__":
    main()
