"""Paired intervals over clusters (documents): pure numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided 95% bootstrap interval and what it rests on."""

    estimate: float
    low: float
    high: float
    items: int
    clusters: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[str], *, resamples: int, seed: int
) -> Interval:
    """sum(numerators) / sum(denominators) with a cluster bootstrap: whole clusters are drawn with replacement.

    With differences of summed NLL as numerators and token counts as denominators this is the paired difference of NLL
    per token (Field & Welsh 2007, doi:10.1111/j.1467-9868.2007.00593.x). One cluster gives an infinite interval: there
    is nothing to resample. Raises ValueError for unequal lengths or no items.
    """
    if not len(numerators) or not len(numerators) == len(denominators) == len(clusters):
        raise ValueError(f"{len(numerators)} numerators, {len(denominators)} denominators, {len(clusters)} clusters")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    top = np.bincount(index, weights=np.asarray(numerators, dtype=float), minlength=len(names))
    bottom = np.bincount(index, weights=np.asarray(denominators, dtype=float), minlength=len(names))
    estimate = float(top.sum() / bottom.sum())
    if len(names) < 2:
        return Interval(estimate, -np.inf, np.inf, len(numerators), len(names))
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    drawn = (counts @ top) / (counts @ bottom)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(estimate, float(low), float(high), len(numerators), len(names))
