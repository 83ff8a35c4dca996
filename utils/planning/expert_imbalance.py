"""How unevenly tokens fall on the ranks that share the experts: the busiest rank over the mean, by a formula."""

from __future__ import annotations

import math
from statistics import NormalDist

# standard deviation of how often experts are chosen, over its mean: as unequal as waiting times (exponential)
POPULARITY_SPREAD = 1.0


def expected(experts: int, ranks: int) -> float:
    """Rows of the busiest of `ranks` over the mean in one layer, where each has as many experts, whichever they are.

    The share of a rank is the sum over its experts, drawn without replacement; that sum varies by
    `POPULARITY_SPREAD` x sqrt((ranks - 1) / (experts - 1)) of its mean. Chance between tokens is left out: 1% at 4,096
    tokens a rank.
    """
    if ranks < 2:
        return 1.0
    spread = POPULARITY_SPREAD * math.sqrt((ranks - 1) / max(1, experts - 1))
    return min(ranks, 1 + _largest_of(ranks) * spread)


def worst(imbalance: float, ranks: int, layers: int) -> float:
    """The same of the worst of `layers` layers, where `imbalance` is that of one: what memory has to hold."""
    if ranks < 2:
        return 1.0
    return min(ranks, 1 + (imbalance - 1) * _largest_of(ranks * max(1, layers)) / _largest_of(ranks))


def _largest_of(count: int) -> float:
    """The expected largest of so many normal numbers, in standard deviations (Blom 1958)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
