"""Evidence that may be looked at after every request: e-processes (Ville 1939; Ramdas et al. 2023, arXiv:2210.01948).

An e-process is at least 0 and has expectation at most 1 under its null hypothesis at any stopping time, so "it is ever
at or above 1/alpha" has probability at most alpha. Each one here is a mixture of likelihood ratios over fixed
alternatives and depends on counts only, so neither the order of events nor the number of looks matters. All functions
return natural logarithms and take numbers or arrays of equal shape; zero counts give log 1 = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

WORSE_RATIOS = (1.25, 1.5, 2.0, 3.0, 5.0, 8.0, 16.0, 32.0)
BETTER_RATIOS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)
LOSS_SHARES = (0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97)
OBJECTIVE_SHARES = (0.001, 0.05, 0.15, 0.3, 0.5, 0.7)
BETS = (0.1, 0.25, 0.5, 0.75, 0.95)
SHARE_RATIOS = (0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)
Arms = tuple[Any, Any]


def worse_rate(events_by_share: Sequence[tuple[float, Arms]]) -> Any:
    """Log evidence against "the canary's rate of this event is at most the control's".

    `events_by_share` holds (share of the traffic on the canary, (events on the canary, events on the control)). Given
    that an event happened, it fell on the canary with probability at most the share when the canary is no worse: the
    base rate cancels, whatever it does (Lindon & Malek 2022, arXiv:2011.03567). Shares of 0 and 1 say nothing here.
    """
    return _rate(events_by_share, 1.0, WORSE_RATIOS)


def not_worse_rate(events_by_share: Sequence[tuple[float, Arms]], ratio: float) -> Any:
    """Log evidence against "the canary's rate is at least `ratio` times the control's" (above 1)."""
    return _rate(events_by_share, ratio, [r for r in BETTER_RATIOS if r < 0.85 * ratio])


def worse_pairs(losses: Any, wins: Any) -> Any:
    """Log evidence against "a discordant pair is lost by the canary with probability at most 1/2" (sign test)."""
    q_K = np.array(LOSS_SHARES)
    return _mixture(_times(losses, np.log(2 * q_K)) + _times(wins, np.log(2 * (1 - q_K))))


def not_worse_pairs(losses: Any, wins: Any, ties: Any, margin: float) -> Any:
    """Log evidence against "losses exceed wins by at least `margin` of all pairs" (testing by betting on a mean).

    Waudby-Smith & Ramdas 2024, arXiv:2010.09686: a stake lambda on margin - (loss - win) never loses more than all
    while lambda < 1 / (1 - margin), and ties alone are evidence too.
    """
    stakes_K = np.array(BETS) / (1 - margin)
    lost, won, tied = (np.log1p(stakes_K * (margin - x)) for x in (1, -1, 0))
    return _mixture(_times(losses, lost) + _times(wins, won) + _times(ties, tied))


def below_objective(events: Any, units: Any, objective: float) -> Any:
    """Log evidence against "the rate is at least `objective`": without any event, log(1/(1 - objective)) per unit."""
    q_K = np.array(OBJECTIVE_SHARES) * objective
    return _bernoulli(events, units, q_K, objective)


def above_bound(events: Any, units: Any, bound: Any) -> Any:
    """Log evidence against "the rate is at most `bound`"; for the step that has no control beside it."""
    bound_1 = np.clip(np.asarray(bound, dtype=float), 1e-9, 0.9)[..., None]
    # odds times r keeps every alternative below 1
    odds = bound_1 / (1 - bound_1) * np.array(WORSE_RATIOS)
    return _bernoulli(events, units, odds / (1 + odds), bound_1)


def other_share(canary: Any, control: Any, share: float) -> Any:
    """Log evidence against "units go to the canary with probability `share`" in either direction."""
    return _rate([(share, (canary, control))], 1.0, SHARE_RATIOS)


def upper_bound(events: Any, units: Any, alpha: float) -> Any:
    """Clopper-Pearson upper confidence bound of a rate; 1 when nothing was seen."""
    from scipy.stats import beta

    events, units = np.asarray(events, dtype=float), np.asarray(units, dtype=float)
    bound = beta.ppf(1 - alpha, events + 1, np.maximum(units - events, 1e-9))
    return np.where(units > events, bound, 1.0)


def _rate(events_by_share: Sequence[tuple[float, Arms]], null: float, alternatives: Sequence[float]) -> Any:
    total: Any = np.zeros(len(alternatives))
    for share, (canary, control) in events_by_share:
        if 0 < share < 1:
            p_null = _on_canary(share, np.array([null]))
            p_K = _on_canary(share, np.array(alternatives))
            total = total + _times(canary, np.log(p_K / p_null)) + _times(control, np.log((1 - p_K) / (1 - p_null)))
    return _mixture(total)


def _on_canary(share: float, ratio: Any) -> Any:
    return share * ratio / (share * ratio + 1 - share)


def _bernoulli(events: Any, units: Any, q_K: Any, null: Any) -> Any:
    quiet = np.asarray(units) - np.asarray(events)
    return _mixture(_times(events, np.log(q_K / null)) + _times(quiet, np.log((1 - q_K) / (1 - null))))


def _times(counts: Any, logs_K: Any) -> Any:
    return np.asarray(counts, dtype=float)[..., None] * logs_K


def _mixture(logs_K: Any) -> Any:
    """Logarithm of the mean over the last axis."""
    top = logs_K.max(axis=-1)
    return top + np.log(np.exp(logs_K - top[..., None]).mean(axis=-1))
