"""The command line."""

import os

# OpenMP reads this once, when torch is loaded. Threads that spin while they wait make a run that shares its cores with
# anything else many times slower (seen: 78 s of CPU time instead of 4.6). A very short spin costs nobody anything, and
# saves a fifth of the time of learning, which is made of short operations.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "RANK" in os.environ:  # torch's warnings in C++ would come from each of several processes, --quiet or not
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from llmshrink.cli.app import main

__all__ = ["main"]
