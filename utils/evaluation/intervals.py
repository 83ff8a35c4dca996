"""Paired intervals over clusters (documents) and seeds: pure numbers in, numbers out.

Shapes: S seeds, N items, C clusters, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
POWER = 0.8
# what a resample of fewer documents can look like says little about what other documents would have given
MIN_CLUSTERS = 6
FEW_DRAWS = 10


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided 95% interval and what it rests on.

    `p` says how well the data fit a true value of `null` or less: twice the tail at or below it, so it is below 0.05
    exactly when the interval lies above `null`. `detectable` is the distance from `null` that such a comparison finds
    in 80% of all cases at the strictest step of four contrasts (the minimum detectable effect).
    """

    estimate: float
    low: float
    high: float
    items: int
    clusters: int
    p: float = 1.0
    detectable: float = np.inf
    seeds: int = 1
    null: float = 0.0


def ratio_interval(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    clusters: Sequence[str],
    *,
    resamples: int,
    seed: int,
    null: float = 0.0,
    unseen: float = 0.0,
) -> Interval:
    """sum(numerators) / sum(denominators) with a bootstrap over whole clusters, and over seeds when there are several.

    With differences of summed NLL as numerators and token counts as denominators this is the paired difference of NLL
    per token. Both may be (N,) or (S, N), a row for each seed; seeds and clusters are crossed and are drawn
    independently (pigeonhole bootstrap, Owen 2007, doi:10.1214/07-AOAS122). Clusters: Field & Welsh 2007,
    doi:10.1111/j.1467-9868.2007.00593.x. The percentiles are widened for few clusters, as a t interval is (Hesterberg
    2015, "expanded percentile", doi:10.1080/00031305.2015.1089789). Fewer than MIN_CLUSTERS clusters give an infinite
    interval. Raises ValueError for unequal lengths or no items.

    Where many items tie, a resample can only show the few that do not, and a bootstrap is too sure. `unseen` is the
    largest difference that an item may have: resamples then also draw from two more items, one won and one lost by as
    much, in clusters of their own, as Agresti & Min (2005, doi:10.1002/sim.1781) add to the cells of matched pairs.
    The estimate is without them.
    """
    top_SN, bottom_SN = (np.atleast_2d(np.asarray(values, dtype=float)) for values in (numerators, denominators))
    lengths = {top_SN.shape[1], bottom_SN.shape[1], len(clusters)}
    if len(lengths) != 1 or not len(clusters) or not {len(top_SN), len(bottom_SN)} <= {1, max(len(top_SN), 1)}:
        raise ValueError(f"numerators {top_SN.shape}, denominators {bottom_SN.shape}, {len(clusters)} clusters")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    top_SC, bottom_SC = _by_cluster(top_SN, index, len(names)), _by_cluster(bottom_SN, index, len(names))
    seeds, count = max(len(top_SC), len(bottom_SC)), len(names)
    estimate = float(top_SC.mean(0).sum() / bottom_SC.mean(0).sum())
    if count < MIN_CLUSTERS:
        return Interval(estimate, -np.inf, np.inf, len(clusters), count, 1.0, np.inf, seeds, null)
    generator = np.random.default_rng(seed)
    if unseen:
        weight = float(bottom_SN.mean())
        top_SC = np.hstack(
            [top_SC, np.full((len(top_SC), 1), unseen * weight), np.full((len(top_SC), 1), -unseen * weight)]
        )
        bottom_SC = np.hstack([bottom_SC, np.full((len(bottom_SC), 2), weight)])
    drawn = bottom_SC.shape[1]
    counts_RC = generator.multinomial(drawn, np.full(drawn, 1 / drawn), size=resamples)
    shares_RS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    top_R, bottom_R = (_drawn(sums, counts_RC, shares_RS) for sums in (top_SC, bottom_SC))
    # a resample whose denominator is not positive says nothing about the ratio: it counts as against it
    drawn_R = np.where(bottom_R > 0, top_R / np.where(bottom_R > 0, bottom_R, 1), -np.inf)
    widening = np.sqrt(count / (count - 1))
    level = stats.norm.cdf(widening * stats.t.ppf(LEVEL / 2, count - 1))
    low, high = np.quantile(drawn_R, [level, 1 - level], method="inverted_cdf")
    spread = float(np.std(drawn_R)) * widening if np.isfinite(drawn_R).all() else np.inf
    below = int((drawn_R <= null).sum())
    tail = (below + 1) / (resamples + 1)
    p = 2 * float(stats.t.cdf(stats.norm.ppf(tail) / widening, count - 1)) if below < resamples else 1.0
    if below < FEW_DRAWS and spread > 0:  # beyond what that many resamples can resolve, the tail of a t distribution
        p = min(p, 2 * float(stats.t.cdf((null - estimate) / spread, count - 1)))
    p = min(1.0, p)
    strictest = -stats.t.ppf(LEVEL / 2 / 4, count - 1) + stats.t.ppf(POWER, count - 1)
    return Interval(estimate, float(low), float(high), len(clusters), count, p, float(strictest * spread), seeds, null)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Adjusted p-values of a family of tests (Holm 1979): at most 5% of all families get any below 0.05 by chance."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _by_cluster(values_SN: np.ndarray, index_N: np.ndarray, count: int) -> np.ndarray:
    return np.stack([np.bincount(index_N, weights=row, minlength=count) for row in values_SN])


def _drawn(sums_SC: np.ndarray, counts_RC: np.ndarray, shares_RS: np.ndarray) -> np.ndarray:
    """The sum over clusters, averaged over seeds, in each resample (R,)."""
    mean_C, seeds = sums_SC.mean(0), len(sums_SC)
    drawn_R = counts_RC @ mean_C
    if seeds > 1:
        # drawing S seeds with replacement shows (S - 1) / S of their variance
        deviations_SC = (sums_SC - mean_C) * np.sqrt(seeds / (seeds - 1))
        drawn_R = drawn_R + np.einsum("rs,sc,rc->r", shares_RS, deviations_SC, counts_RC)
    return drawn_R
