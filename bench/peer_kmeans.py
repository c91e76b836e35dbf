"""scikit-learn's KMeans and kmeans1d on the numbers of a .npy file: one JSON line. Run by `bench.clusters`.

    PYTHON bench/peer_kmeans.py NUMBERS.npy CLUSTERS STARTS

PYTHON is that of an environment with scikit-learn and kmeans1d.
"""

from __future__ import annotations

import json
import sys
import time

import kmeans1d
import numpy
from sklearn.cluster import KMeans


def cost(values: numpy.ndarray, centres: numpy.ndarray) -> float:
    """The sum of squared distances to the nearest centre, float64."""
    centres = numpy.sort(centres.ravel().astype(numpy.float64))
    nearest = centres[numpy.searchsorted((centres[1:] + centres[:-1]) / 2, values)]
    return float(numpy.square(values - nearest).sum())


def main() -> None:
    """Time one start of scikit-learn, then find the best of several, then kmeans1d on the first 65 536 numbers."""
    values, clusters, starts = numpy.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    column, wide = values[:, None], values.astype(numpy.float64)
    seconds, costs = [], []
    for seed in range(starts):
        begin = time.perf_counter()
        found = KMeans(clusters, n_init=1, random_state=seed).fit(column)
        seconds.append(time.perf_counter() - begin)
        costs.append(cost(wide, found.cluster_centers_))
    few = wide[: 1 << 16]
    begin = time.perf_counter()
    _, centres = kmeans1d.cluster(few, clusters)
    exact = time.perf_counter() - begin
    few_cost = cost(few, numpy.array(centres))
    print(json.dumps({"seconds": seconds, "costs": costs, "exact_seconds": exact, "exact_cost": few_cost}))


if __name__ == "__main__":
    main()
