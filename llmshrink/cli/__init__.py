"""The command line."""

import os

# OpenMP reads this once, when torch is loaded. Threads that spin while they wait make a run that shares its cores with
# anything else many times slower (seen: 78 s of CPU time instead of 4.6).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from llmshrink.cli.app import main

__all__ = ["main"]
