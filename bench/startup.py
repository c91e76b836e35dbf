"""`llmshrink --help` beside `python -c pass`: seconds, and whether torch was imported.

python -m bench.startup
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 9


def seconds(command: list[str]) -> float:
    """Median wall clock of a process."""
    found = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


if __name__ == "__main__":
    check = "import sys; import llmshrink.cli; print('torch' in sys.modules)"
    torch = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout.strip()
    bare, ours = seconds([sys.executable, "-c", "pass"]), seconds([sys.executable, "-m", "llmshrink", "--help"])
    print(f"python -c pass {bare:.2f} s, llmshrink --help {ours:.2f} s, torch imported: {torch}")
