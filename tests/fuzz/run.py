"""Fuzz the readers of foreign bytes, led by coverage (atheris, libFuzzer): `make fuzz`, `make fuzz SECONDS=600`.

    python -m fuzz.run [--seconds 60] [--out folder] [TARGET ...]

Each target runs in a process of its own, from valid files that it makes when it starts. What breaks a reader is kept in
OUT/TARGET/; give it to FOUND in test_fuzz.py, so that it never breaks again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT, MEMORY_MB = 20, 4096  # of one input; more is a finding


def fuzz(name: str, folder: Path, seconds: int) -> None:
    """Run one target until its time is over or it breaks; this ends the process."""
    import atheris

    with atheris.instrument_imports(include=["llmshrink"]):
        from fuzz.targets import TARGETS

        corpus = folder / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            target = TARGETS[name](Path(work))
            for number, seed in enumerate(target.seeds):
                (corpus / f"seed-{number}").write_bytes(seed)
                target.run(seed)  # what is imported late is imported now: it may take longer than TIMEOUT
            limits = [f"-max_total_time={seconds}", f"-timeout={TIMEOUT}", f"-rss_limit_mb={MEMORY_MB}"]
            told = ["-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={folder}/"]
            atheris.Setup([sys.argv[0], *limits, *told, str(corpus)], target.run)
            atheris.Fuzz()


def main() -> int:
    """Run targets one after another; the exit code says whether any was broken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        fuzz(asked.targets[0], asked.out, asked.seconds)
        return 0
    from fuzz.targets import TARGETS

    broken = 0
    for name in asked.targets or TARGETS:
        folder = asked.out / name
        command = [sys.executable, "-m", "fuzz.run", name, "--one", "--out", str(folder)]
        done = subprocess.run([*command, "--seconds", str(asked.seconds)], capture_output=True, text=True, check=False)
        count = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        print(f"{name}: {count[1] if count else 'no'} executions, exit {done.returncode}", flush=True)
        if done.returncode:
            broken += 1
            (folder / "log").write_text(done.stderr)
            print(f"  kept in {folder}: {', '.join(p.name for p in folder.iterdir() if p.is_file())}", flush=True)
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
