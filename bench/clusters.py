"""One table of values for a whole matrix, beside scikit-learn's KMeans and kmeans1d on the same machine in one run.

    python -m bench.clusters --peer PYTHON [--clusters 16] [--starts 10] [--threads 2]

PYTHON is that of an environment with scikit-learn and kmeans1d. The matrix is 1024 x 4096 of normal numbers in
bfloat16. scikit-learn is timed for one start each; kmeans1d, exact as ours, on the first 65 536 numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy
import torch

from llmshrink.methods.clusters import centroids, cost

PEER = Path(__file__).parent / "peer_kmeans.py"
FEW = 1 << 16


def main() -> None:
    """Print times and costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    values = torch.randn(1, 1024 * 4096, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        table = centroids(values, None, args.clusters)
        seconds.append(time.perf_counter() - start)
    own, few = float(cost(values, None, table)), values[:, :FEW]
    own_few = float(cost(few, None, centroids(few, None, args.clusters)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbers.npy"
        numpy.save(file, values[0].numpy())
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        command = [args.peer, str(PEER), str(file), str(args.clusters), str(args.starts)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    peer = json.loads(done.stdout)
    mine, theirs = statistics.median(seconds), statistics.median(peer["seconds"])
    print(f"ours {mine:.3f} s, cost {own:.2f}")
    print(f"scikit-learn, n_init=1: {theirs:.1f} s, {theirs / mine:.0f} times ours; costs", end=" ")
    print(" ".join(f"{one / own:.4f}" for one in sorted(peer["costs"])), "of ours")
    print(f"kmeans1d, {FEW} numbers: {peer['exact_seconds']:.2f} s, cost {peer['exact_cost'] / own_few:.9f} of ours")


if __name__ == "__main__":
    main()
