"""The paired interval: its estimate is a ratio of sums, its width comes from clusters, its coverage is what it says."""

from __future__ import annotations

import math
import unittest

import numpy as np

from utils.evaluation.intervals import Interval, ratio_interval


def interval(top: np.ndarray, bottom: np.ndarray, clusters: np.ndarray, resamples: int = 2000) -> Interval:
    names = [str(c) for c in clusters]
    return ratio_interval(top.tolist(), bottom.tolist(), names, resamples=resamples, seed=0)


def width(found: Interval) -> float:
    return found.high - found.low


class RatioInterval(unittest.TestCase):
    def test_estimate_is_the_ratio_of_the_sums_and_not_the_mean_of_ratios(self) -> None:
        found = ratio_interval([1.0, 10.0, 3.0], [1.0, 2.0, 4.0], ["a", "b", "b"], resamples=100, seed=0)
        self.assertAlmostEqual(found.estimate, 14 / 7)
        self.assertEqual((found.items, found.clusters), (3, 2))
        self.assertTrue(found.low <= found.estimate <= found.high)

    def test_clustered_data_have_a_wider_interval_than_the_same_data_taken_as_independent(self) -> None:
        generator = np.random.default_rng(0)
        clusters = np.repeat(np.arange(30), 10)
        values = generator.normal(size=30)[clusters] + 0.3 * generator.normal(size=300)
        ones = np.ones(300)
        clustered, independent = interval(values, ones, clusters), interval(values, ones, np.arange(300))
        self.assertAlmostEqual(clustered.estimate, independent.estimate)
        # cluster means vary with variance 1 + 0.09/10, single values with 1.09
        expected = math.sqrt((1.009 / 30) / (1.09 / 300))
        self.assertAlmostEqual(width(clustered) / width(independent) / expected, 1.0, delta=0.25)

    def test_one_cluster_gives_an_infinite_interval_that_excludes_nothing(self) -> None:
        found = ratio_interval([1.0, 2.0], [1.0, 1.0], ["a", "a"], resamples=100, seed=0)
        self.assertEqual((found.estimate, found.low, found.high), (1.5, -math.inf, math.inf))

    def test_interval_covers_the_truth_about_95_times_in_100(self) -> None:
        generator = np.random.default_rng(1)
        covered, repeats, truth = 0, 500, 0.3
        for _ in range(repeats):
            sizes = generator.integers(1, 9, size=40)
            clusters = np.repeat(np.arange(40), sizes)
            tokens = generator.integers(5, 30, size=len(clusters)).astype(float)
            effect = truth + generator.normal(size=40)[clusters] * 0.5 + generator.normal(size=len(clusters)) * 0.3
            found = interval(effect * tokens, tokens, clusters, resamples=400)
            covered += found.low <= truth <= found.high
        self.assertTrue(0.90 <= covered / repeats <= 0.99, covered / repeats)

    def test_interval_agrees_with_scipy_on_independent_data(self) -> None:
        from scipy.stats import bootstrap

        generator = np.random.default_rng(2)
        top, bottom = generator.normal(2.0, 1.0, 200), generator.uniform(1.0, 3.0, 200)
        ours = interval(top, bottom, np.arange(200), resamples=9999)
        theirs = bootstrap(
            (top, bottom),
            lambda x, y, axis=-1: x.sum(axis) / y.sum(axis),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=9999,
            rng=np.random.default_rng(3),
        ).confidence_interval
        self.assertAlmostEqual(ours.low, theirs.low, delta=0.05 * width(ours))
        self.assertAlmostEqual(ours.high, theirs.high, delta=0.05 * width(ours))

    def test_result_is_a_function_of_the_seed_and_not_of_the_order(self) -> None:
        names = [f"d{i:02d}" for i in range(20)]
        top, bottom = [(i * 7 % 20) / 3 for i in range(20)], [1.0 + i % 5 for i in range(20)]
        first = ratio_interval(top, bottom, names, resamples=500, seed=7)
        self.assertEqual(ratio_interval(top, bottom, names, resamples=500, seed=7), first)
        backwards = ratio_interval(top[::-1], bottom[::-1], names[::-1], resamples=500, seed=7)
        self.assertAlmostEqual(backwards.low, first.low, places=12)
        self.assertAlmostEqual(backwards.high, first.high, places=12)
        self.assertNotEqual(ratio_interval(top, bottom, names, resamples=500, seed=8), first)

    def test_unequal_lengths_and_no_items_are_refused(self) -> None:
        for arguments in (([1.0], [1.0, 2.0], ["a"]), ([], [], []), ([1.0], [1.0], [])):
            with self.assertRaises(ValueError):
                ratio_interval(*arguments, resamples=100, seed=0)


if __name__ == "__main__":
    unittest.main()
