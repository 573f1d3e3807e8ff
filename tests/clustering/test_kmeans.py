"""k-means in one dimension against all partitions, and where values begin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dwindle.clustering.initial_values import initial_values, nearest
from dwindle.clustering.kmeans import kmeans


def error(points, centroids):
    return float((np.abs(points[:, None] - np.asarray(centroids, np.float64)).min(axis=1) ** 2).sum())


def least_error(points, clusters):
    """Of all ways to cut the sorted points into parts, the one with the least squared distance to the parts' means."""
    points = np.sort(points.astype(np.float64))
    return min(
        sum(((part - part.mean()) ** 2).sum() for part in np.split(points, cuts))
        for cuts in itertools.combinations(range(1, len(points)), clusters - 1)
    )


@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_no_partition_is_better(clusters, seed):
    generator = np.random.default_rng(seed)
    points = generator.choice([generator.normal(size=11), generator.integers(-3, 4, 11)]).astype(np.float32)
    found = kmeans(points, clusters)
    assert len(found) <= clusters
    assert np.all(np.diff(found) > 0)
    assert error(points, found) == pytest.approx(least_error(points, clusters), rel=1e-5, abs=1e-6)


def test_zero_is_kept_and_the_rest_is_best():
    points = np.array([-2, -2.2, -1.8, 0, 0, 0, 0.1, 1.9, 2.1, 2], np.float32)
    np.testing.assert_allclose(kmeans(points, 3, keep_zero=True), [-2, 0, 2], atol=1e-6)
    assert 0 in kmeans(np.array([1, 2, 3, 4, 5], np.float32), 3, keep_zero=True)
    np.testing.assert_array_equal(kmeans(np.zeros(5, np.float32), 3, keep_zero=True), [0])


def test_many_points_converge_to_less_error_than_lloyds_steps_from_quantiles():
    points = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    few = points[:20_000]
    assert error(few, kmeans(few, 16, budget=2**16)) <= 1.01 * error(few, kmeans(few, 16, budget=2**30))
    centroids = np.quantile(points, (np.arange(16) + 0.5) / 16)
    for _ in range(50):
        owner = nearest(points, centroids)
        centroids = np.array([points[owner == j].mean() for j in range(16)])
    assert error(points, kmeans(points, 16)) < error(points, centroids)


def test_other_beginnings_are_what_they_say():
    points = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    (line,) = initial_values([points], 5, "linear", keep_zero=False)
    np.testing.assert_allclose(np.diff(line), (points.max() - points.min()) / 4, rtol=1e-4)
    (parts,) = initial_values([points], 4, "quantile", keep_zero=False)
    np.testing.assert_allclose(parts, np.quantile(points, [1 / 8, 3 / 8, 5 / 8, 7 / 8]), rtol=1e-5)
    # Of a normal density the cube root is normal with sqrt(3) times the deviation; the sample ends at 3.5 or so.
    (dense,) = initial_values([points], 8, "density", keep_zero=False)
    inner = np.sqrt(3) * np.array([-0.887, -0.489, -0.157, 0.157, 0.489, 0.887])
    np.testing.assert_allclose(dense[1:-1], inner, atol=0.2)
    (given,) = initial_values([points], 3, np.array([-1, 0.2, 1], np.float32), keep_zero=True)
    np.testing.assert_array_equal(given, np.array([-1, 0, 1], np.float32))
