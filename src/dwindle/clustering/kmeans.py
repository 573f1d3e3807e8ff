"""k-means in one dimension: exact by dynamic programming, and Lloyd's steps to convergence on sorted points."""

from __future__ import annotations

import numpy as np

#: Points times clusters that are solved exactly, all groups together; more points are first merged with neighbours.
EXACT_BUDGET = 2**20
MOST_STEPS = 1000


def kmeans(points: np.ndarray, clusters: int, *, keep_zero: bool = False, budget: int = EXACT_BUDGET) -> np.ndarray:
    """Return the centroids with the least sum of squared distances, ``sum_i min_j (w_i - c_j)^2``.

    Exact (Wang and Song 2011) where different points times clusters are at most ``budget``. Above that, neighbours are
    merged before, and Lloyd's steps go on from there on all points until no point changes its cluster.

    Args:
        points: Shape ``(n,)``.
        clusters: How many centroids, at least 1.
        keep_zero: Whether one of them is 0 exactly. Points that are 0 are its own; the others share the rest, and may
            join it.
        budget: What may be solved exactly.

    Returns:
        Ascending, float32; fewer than ``clusters`` where there are fewer different points.

    References:
        Wang and Song 2011, Ckmeans.1d.dp, R Journal 3(2), equation 1; Wu 1991, Optimal quantization by matrix
        searching, Journal of Algorithms 12(4), for the monotone boundaries that make it ``n log n``.
    """
    values, found = np.unique(points, return_counts=True)
    values, counts = values.astype(np.float64), found.astype(np.float64)
    most = max(budget // clusters, 4 * clusters, 64)
    if not keep_zero:
        return _solved(values, counts, clusters, most).astype(np.float32)
    kept = values != 0
    values, counts = values[kept], counts[kept]
    if clusters == 1 or not len(values):
        return np.zeros(1, np.float32)
    centroids = np.sort(np.append(_solved(values, counts, clusters - 1, most), 0.0))
    return lloyd(values, counts, centroids, centroids == 0).astype(np.float32)


def _solved(values: np.ndarray, counts: np.ndarray, clusters: int, most: int) -> np.ndarray:
    if len(values) <= clusters:
        return values
    if len(values) <= most:
        return optimal(values, counts, clusters)
    # Runs of neighbours with about the same number of points each.
    ends = np.cumsum(counts)
    runs = np.minimum((ends - 1) * most // ends[-1], most - 1).astype(np.int64)
    begins = np.flatnonzero(np.diff(runs, prepend=-1))
    weights = np.add.reduceat(counts, begins)
    merged = np.add.reduceat(counts * values, begins) / weights
    start = optimal(merged, weights, clusters) if len(merged) > clusters else merged
    return lloyd(values, counts, start, np.zeros(len(start), bool))


def optimal(values: np.ndarray, counts: np.ndarray, clusters: int) -> np.ndarray:
    """Return the optimal centroids of ascending ``values`` that occur ``counts`` times; ``clusters < len(values)``."""
    size, middle = len(values), np.average(values, weights=counts)
    centred = values - middle
    mass, first, second = (
        np.concatenate([[0.0], np.cumsum(counts * power)]) for power in (1.0, centred, centred * centred)
    )

    def cost(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Return the squared distances of the values from ``begin`` to before ``end`` to their mean."""
        total = first[end] - first[begin]
        found: np.ndarray = second[end] - second[begin] - total * total / np.maximum(mass[end] - mass[begin], 1e-300)
        return found

    ends = np.arange(size + 1)
    least = cost(np.zeros_like(ends), ends)
    choices = []
    for _ in range(clusters - 1):
        least, choice = _one_more(least, cost)
        choices.append(choice)
    cuts = [size]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    edges = np.array([0, *reversed(cuts)])
    weights = np.diff(mass[edges])
    kept = weights > 0  # where distances are 0 already, a cluster may be left empty
    found: np.ndarray = np.diff(first[edges])[kept] / weights[kept] + middle
    return found


def _one_more(least: np.ndarray, cost: object) -> tuple[np.ndarray, np.ndarray]:
    """Return the least cost of the first ``i`` values with one cluster more, and where that cluster begins.

    The best beginnings ascend with ``i``, so those of every second one bound those between: each level of halving looks
    at few more than all values once.
    """
    size = len(least) - 1
    found, choice = np.zeros(size + 1), np.zeros(size + 1, np.int64)
    step = 1 << max(size, 1).bit_length()
    while step >= 1:
        ends = np.arange(step, size + 1, 2 * step)
        if len(ends):
            low = choice[ends - step]
            after = ends + step
            high = np.where(after <= size, choice[np.minimum(after, size)], size)
            high = np.minimum(high, ends)
            lengths = high - low + 1
            begins = np.cumsum(lengths) - lengths
            places = np.arange(lengths.sum()) + np.repeat(low - begins, lengths)
            values = least[places] + cost(places, np.repeat(ends, lengths))  # type: ignore[operator]
            best = np.minimum.reduceat(values, begins)
            hits = np.flatnonzero(values == np.repeat(best, lengths))
            owners = np.searchsorted(begins, hits, side="right") - 1
            choice[ends[owners[::-1]]] = places[hits[::-1]]  # the first of equals is written last
            found[ends] = best
        step //= 2
    return found, choice


def lloyd(values: np.ndarray, counts: np.ndarray, centroids: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Return what Lloyd's steps converge to: each centroid the mean of the values nearest to it.

    Args:
        values: Ascending, shape ``(n,)``.
        counts: How often each occurs.
        centroids: Ascending, to begin with.
        fixed: Boolean: centroids that stay.
    """
    mass, total = (np.concatenate([[0.0], np.cumsum(part)]) for part in (counts, counts * values))
    before = np.zeros(0)
    for _ in range(MOST_STEPS):
        edges = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(values)]])
        if np.array_equal(edges, before):
            break
        before = edges
        members = np.diff(mass[edges])
        means = np.diff(total[edges]) / np.maximum(members, 1e-300)
        centroids = np.where((members > 0) & ~fixed, means, centroids)
    return centroids
