"""A two-parameter power law through the losses at several sizes of the data, and what twice the data would bring.

loss(n) = a n^b (Hestness et al. 2017, arXiv:1712.00409), fitted to the logarithms of both by least squares. Its
uncertainty has two sources, which add: other documents would have given other losses (the same bootstrap over
documents as everywhere, all sizes scored on the same items), and another training run another loss at each size, which
shows in how far the losses lie off the line. A curve of another form is looked for by a quadratic term; where there is
one the interval also covers what that curve says, and the reader is told.

Shapes: K sizes, N items, C documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from utils.evaluation.intervals import LEVEL, MIN_CLUSTERS

Sums = tuple[np.ndarray, np.ndarray]
MIN_SIZES = 3
# a quadratic term so many standard errors away from 0 counts: missing one costs more than a false alarm
BENT = 1.0


@dataclass(frozen=True)
class OneDoubling:
    """What twice the data would bring: the loss saved, above 0 when it helps, with its two-sided 95% interval.

    `exponent` is b, `losses` are those measured at `sizes`, `fitted` those of the law. `is_bent`: the losses bend away
    from a power law, and the interval is widened to cover it.
    """

    estimate: float
    low: float
    high: float
    exponent: float
    is_bent: bool
    sizes: tuple[float, ...]
    losses: tuple[float, ...]
    fitted: tuple[float, ...]
    items: int
    clusters: int

    @property
    def is_untold(self) -> bool:
        """Whether the sizes are too few to see a bend by: a line and a bend through three points leave nothing over."""
        return len(self.sizes) == MIN_SIZES

    @property
    def is_shown(self) -> bool:
        """Whether it is told apart from nothing."""
        return self.low > 0 or self.high < 0


def one_doubling(
    sizes: Sequence[float],
    loss_KN: np.ndarray,
    weights: Sequence[float],
    clusters: Sequence[str],
    *,
    resamples: int,
    seed: int,
    unseen: float = 0.0,
) -> OneDoubling:
    """The gain from the largest size to twice it, in loss per unit of weight (NLL sums and tokens: nats per token).

    `sizes` (K,) rise; `clusters` (N,) are the items' documents. Fewer than MIN_CLUSTERS documents, or a loss that is
    not positive, give an infinite interval. Raises ValueError for fewer than MIN_SIZES sizes or unequal lengths.

    Where many items tie, `unseen` is the largest loss that one may have: resamples then also draw from two more items,
    one that more data teach and one that they spoil (as `intervals.ratio_interval`). The estimate is without them.
    """
    if len(sizes) < MIN_SIZES or loss_KN.shape != (len(sizes), len(clusters)) or len(weights) != len(clusters):
        raise ValueError(
            f"{len(sizes)} sizes, losses {loss_KN.shape}, {len(weights)} weights, {len(clusters)} clusters"
        )
    names, index_N = np.unique(np.asarray(clusters), return_inverse=True)
    count = len(names)
    loss_KC = np.stack([np.bincount(index_N, weights=row, minlength=count) for row in loss_KN])
    weight_C = np.bincount(index_N, weights=np.asarray(weights, dtype=float), minlength=count)
    loss_K = loss_KC.sum(1) / weight_C.sum()
    x_K = np.log2(np.asarray(sizes, dtype=float) / sizes[-1])
    if unseen:
        loss_KC, weight_C = _with_unseen(loss_KC, weight_C, x_K, unseen, weight_C.sum() / len(clusters))
    drawn = len(weight_C)
    counts_RC = np.random.default_rng(seed).multinomial(drawn, np.full(drawn, 1 / drawn), size=resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_RK = np.log((counts_RC @ loss_KC.T) / (counts_RC @ weight_C)[:, None])
        log_K = np.log(loss_K)
    facts: dict[str, Any] = {
        "sizes": tuple(map(float, sizes)),
        "losses": tuple(map(float, loss_K)),
        "items": len(clusters),
    }
    if count < MIN_CLUSTERS or not (np.isfinite(log_RK).all() and np.isfinite(log_K).all()):
        return OneDoubling(np.nan, -np.inf, np.inf, np.nan, False, fitted=(), clusters=count, **facts)
    line, bow = (_Fit.of(x_K, log_K, log_RK, degree, count) for degree in (1, 2))
    is_bent = abs(bow.last) > BENT * bow.last_error
    fits = [line, bow] if is_bent else [line]
    low, high = min(fit.gain - fit.half_width for fit in fits), max(fit.gain + fit.half_width for fit in fits)
    fitted = tuple(map(float, np.exp(line.at_K)))
    return OneDoubling(line.gain, low, high, line.last, is_bent, fitted=fitted, clusters=count, **facts)


@dataclass(frozen=True)
class _Fit:
    """A polynomial in log2(size / largest) through the logarithms of the losses, and the gain of one doubling."""

    gain: float
    half_width: float
    last: float
    last_error: float
    at_K: np.ndarray

    @classmethod
    def of(cls, x_K: np.ndarray, log_K: np.ndarray, log_RK: np.ndarray, degree: int, clusters: int) -> _Fit:
        powers_KP = np.vander(x_K, degree + 1, increasing=True)
        solve_PK = np.linalg.pinv(powers_KP)
        theta_P, theta_RP = solve_PK @ log_K, log_RK @ solve_PK.T
        gain, gain_R = _gain(theta_P), _gain(theta_RP)
        # over documents: widened for few of them as in `intervals`
        widening, t_documents = np.sqrt(clusters / (clusters - 1)), -stats.t.ppf(LEVEL / 2, clusters - 1)
        # over training runs: by how far the losses lie off the curve
        free = len(x_K) - degree - 1
        off = np.sqrt(((log_K - powers_KP @ theta_P) ** 2).sum() / free) if free else 0.0
        t_runs = -stats.t.ppf(LEVEL / 2, free) if free else 0.0
        slope_P = np.concatenate([[gain], np.full(degree, -np.exp(theta_P.sum()))])
        spread_PP = np.linalg.inv(powers_KP.T @ powers_KP)
        return cls(
            float(gain),
            float(
                np.hypot(t_documents * widening * np.std(gain_R), t_runs * off * np.sqrt(slope_P @ spread_PP @ slope_P))
            ),
            float(theta_P[-1]) if degree > 1 else float(theta_P[-1] / np.log(2)),
            float(np.hypot(widening * np.std(theta_RP[:, -1]), off * np.sqrt(spread_PP[-1, -1]))),
            powers_KP @ theta_P,
        )


def _with_unseen(loss_KC: np.ndarray, weight_C: np.ndarray, x_K: np.ndarray, largest: float, weight: float) -> Sums:
    """Sums by document with two more items: the loss of one falls from the `largest` to 0, that of the other rises."""
    falls_K = largest * weight * x_K / x_K[0]
    return np.column_stack([loss_KC, falls_K, falls_K[0] - falls_K]), np.append(weight_C, [weight, weight])


def _gain(theta: np.ndarray) -> np.ndarray:
    """Loss at the largest size minus that at twice it, of polynomials (..., P) in log2(size / largest)."""
    return np.exp(theta[..., 0]) - np.exp(theta.sum(-1))
