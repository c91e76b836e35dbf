"""Random SIGKILLs of runs, and of the runs that go on after them: how many lose anything.

    python -m bench.kills [--kills 1000] [--seed 0] [--jobs 2]

A run is killed at a random moment and started again; what goes on is killed too with probability 1/2, again and again,
then let to the end. A loss is an output that differs by a byte from that of an unbroken run, that is missing at the
end or holds anything else, or a process that ends with an exit code of its own. Prints a line for each recipe.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "e2e")]

from crash_case import CASES, KILLS, Case, make_case  # noqa: E402
from crash_server import CrashServer  # noqa: E402
from helpers import assert_complete, content  # noqa: E402

COLUMNS = ["runs", "kills", "resumed", "too late", "losses"]  # resumed: kills of a run that went on after another
AGAIN = 0.5  # probability that a run that goes on is killed too


def one_run(case: Case, pick: random.Random, counts: Counter[str], most: int) -> None:
    """One output, with at most `most` kills on its way."""
    out, kills = case.new_folder() / "out", 0
    while kills < most and (kills == 0 or pick.random() < AGAIN):
        ended = case.run(out, kill_after=pick.uniform(0.0, case.seconds))
        if ended.code in KILLS:
            kills += 1
            counts["kills"] += 1
            counts["resumed"] += kills > 1
        elif ended.code == 0 or (ended.code == 7 and out.exists()):
            counts["too late"] += 1
            break
        else:
            counts["losses"] += 1
            print(f"exit code {ended.code}: {ended.message}", file=sys.stderr)
            break
        if out.exists():
            assert_complete(out, killed=True)
    complete = out.exists()
    last = case.run(out)
    counts["runs"] += 1
    whole = last.code == (7 if complete else 0) and out.exists() and content(out) == case.expected
    clean = whole and [path.name for path in out.parent.iterdir()] == ["out"]
    if clean:
        assert_complete(out)
        shutil.rmtree(out)
    else:
        counts["losses"] += 1
        print(f"{out}: exit code {last.code}: {last.message}", file=sys.stderr)


def kill(shares: list[tuple[str, int]], seed: int, folder: Path, model: Path, text: Path) -> Counter[str]:
    """All kills of some recipes, one after the other."""
    total = Counter[str]()
    with CrashServer() as server:
        for name, kills in shares:
            counts, pick = Counter[str](), random.Random(f"{seed} {name}")
            (folder / name).mkdir()
            case = make_case(server, name, model, text, folder / name)
            start = time.perf_counter()
            while counts["kills"] < kills:
                one_run(case, pick, counts, kills - counts["kills"])
            seconds = time.perf_counter() - start
            print(f"{name:24s} {' '.join(f'{counts[c]:9d}' for c in COLUMNS)} {seconds:9.1f}", flush=True)
            total += counts
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()

    from tiny import TEXT, build_model, config

    with tempfile.TemporaryDirectory(prefix="llmshrink-kills-") as name:
        folder = Path(name)
        model, text = folder / "model", folder / "text.txt"
        small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
        build_model(model, config("llama", **small))
        text.write_text("\n\n".join(TEXT))
        shares = [(case, asked.kills // len(CASES) + (i < asked.kills % len(CASES))) for i, case in enumerate(CASES)]
        print(f"seed {asked.seed}\n{'recipe':24s} {' '.join(f'{c:>9s}' for c in COLUMNS)}   seconds")
        with ThreadPoolExecutor(asked.jobs) as pool:
            jobs = [
                pool.submit(kill, shares[i :: asked.jobs], asked.seed, folder, model, text) for i in range(asked.jobs)
            ]
            total = sum((job.result() for job in jobs), Counter[str]())
        print(f"{'all':24s} {' '.join(f'{total[c]:9d}' for c in COLUMNS)}")
    sys.exit(1 if total["losses"] else 0)


if __name__ == "__main__":
    main()
