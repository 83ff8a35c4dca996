"""Thousands of ramps at once, to measure how often a gate is wrong and how soon it is right.

    ramp(Scenario(base_rate=0.01), gate, policy, runs=2000, seed=0) -> Outcome(promoted, rolled_back, ...)

Arrays have one entry per run; the gate is called with counts that are such arrays, by the very functions that judge a
real rollout. Users' traffic is binomial, as the balancer's hash makes it. Runs that have ended are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.rollout import gate as real
from utils.rollout.gate import Counts
from utils.rollout.policy import UNITS, Policy, RampStep

# counts since the beginning, counts at this step, policy, step -> (alarm, ready), one entry per run
Gate = Callable[[Counts, Counts, Policy, RampStep], tuple[Any, Any]]


@dataclass(frozen=True)
class Scenario:
    """What the two models do. Rates are per request; the canary's is `ratio` times production's."""

    base_rate: float = 0.01
    ratio: float = 1.0
    jump_to: float | None = None
    """Base rate of both arms from the middle of each step on: a shared incident."""
    session_requests: int = 1
    """Requests per session. Above 1, errors cluster: a tenth of the sessions has ten times the rate."""
    per_request: bool = False
    """Count every error of a session, which is wrong; to show what it does."""
    slow: float = 0.05
    slow_ratio: float = 1.0
    """How many times more often the canary is slower than production's 95th percentile."""
    client_errors: float = 0.02
    pairs: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Paired metric -> (share of discordant pairs, share of them that the canary loses)."""
    pairs_per_look: int = 1
    units_per_look: float = 20.0
    """Canary units between two looks, on average; the control has what the share leaves."""
    looks: int = 400
    """Looks per step, after which the deadline rolls back."""


@dataclass(frozen=True)
class RampOutcome:
    """One entry per run. `canary_units` are those seen until the end, all steps together."""

    promoted: np.ndarray
    alarmed: np.ndarray
    canary_units: np.ndarray
    pairs_seen: np.ndarray

    @property
    def shares(self) -> dict[str, float]:
        late = ~(self.promoted | self.alarmed)
        names = {"promoted": self.promoted, "rolled_back": self.alarmed, "deadline": late}
        return {name: float(hit.mean()) for name, hit in names.items()}


NULL_PAIRS = {
    "probe_errors": (0.02, 0.5),
    "first_token": (0.3, 0.5),
    "per_token": (0.3, 0.5),
    "output": (0.05, 0.5),
    "quality": (0.2, 0.5),
}


def our_gate(counts: Counts, here: Counts, policy: Policy, step: RampStep) -> tuple[Any, Any]:
    """The functions behind `gate.judge`, on arrays."""
    alarm = np.any([log_e >= limit for _, log_e, limit in real.alarms(counts, policy)], axis=0)
    shown: dict[str, Any] = {}
    for metric, _, log_e, limit in real.evidence(here, counts, policy, step):
        shown[metric] = shown.get(metric, False) | (log_e >= limit)
    return alarm, np.all(list(shown.values()), axis=0)


def ramp(scenario: Scenario, gate: Gate, policy: Policy, *, runs: int, seed: int) -> RampOutcome:
    """Walk all steps with a look at the gate after every batch."""
    generator = np.random.default_rng(seed)
    promoted, alarmed = np.zeros(runs, dtype=bool), np.zeros(runs, dtype=bool)
    canary_units, pairs_seen = np.zeros(runs, dtype=int), np.zeros(runs, dtype=int)
    alive, total = np.arange(runs), Counts()
    for number, step in enumerate(policy.steps):
        waiting, here = alive, Counts()
        arrived: list[tuple[np.ndarray, Counts]] = []
        for look in range(scenario.looks):
            seen = _batch(scenario, step, policy, len(waiting), look >= scenario.looks // 2, generator)
            total, here = total + seen, here + seen
            canary_units[waiting] += here_units(seen, step)
            pairs_seen[waiting] += scenario.pairs_per_look
            alarm, ready = gate(total, here, policy, step)
            alarmed[waiting[alarm]] = True
            done = ready & ~alarm
            if done.any():
                arrived.append((waiting[done], _kept(total, done)))
            stay = ~(alarm | ready)
            waiting, total, here = waiting[stay], _kept(total, stay), _kept(here, stay)
            if not len(waiting):
                break
        alive = np.concatenate([ids for ids, _ in arrived]) if arrived else np.array([], dtype=int)
        if not len(alive):
            break
        total = _joined([counts for _, counts in arrived])
        if number + 1 == len(policy.steps):
            promoted[alive] = True
    return RampOutcome(promoted, alarmed, canary_units, pairs_seen)


def here_units(seen: Counts, step: RampStep) -> Any:
    """Canary units of one batch."""
    return seen.at(step.share_bp, UNITS)[0]


def _batch(
    scenario: Scenario, step: RampStep, policy: Policy, runs: int, late: bool, generator: np.random.Generator
) -> Counts:
    """One batch of traffic and probes for each run."""
    total = round(scenario.units_per_look / step.share)
    canary = generator.binomial(total, step.share, runs)
    base = scenario.jump_to if late and scenario.jump_to is not None else scenario.base_rate
    arms: dict[str, Any] = {}
    sizes = (canary, total - canary)
    rates = (min(base * scenario.ratio, 1.0), base)
    arms["errors"] = tuple(_errors(scenario, n, rate, generator) for n, rate in zip(sizes, rates, strict=True))
    slow = (min(scenario.slow * scenario.slow_ratio, 1.0), scenario.slow)
    arms["slow"] = tuple(generator.binomial(n, rate) for n, rate in zip(sizes, slow, strict=True))
    arms["client_errors"] = tuple(generator.binomial(n, scenario.client_errors) for n in sizes)
    arms[UNITS] = sizes
    pairs: dict[str, Any] = {}
    for metric in policy.paired:
        discordant, lost = (NULL_PAIRS | scenario.pairs).get(metric.name, (0.0, 0.5))
        apart = generator.binomial(scenario.pairs_per_look, discordant, runs)
        losses = generator.binomial(apart, lost)
        pairs[metric.name] = (losses, apart - losses, scenario.pairs_per_look - apart)
    return Counts({step.share_bp: arms}, pairs)


def _errors(scenario: Scenario, units: Any, rate: float, generator: np.random.Generator) -> Any:
    size = scenario.session_requests
    if size == 1:
        return generator.binomial(units, rate)
    bad_rate = min(10 * rate, 1.0)
    sessions = generator.binomial(units, 0.1)
    if scenario.per_request:
        return generator.binomial(sessions * size, bad_rate)
    return generator.binomial(sessions, 1 - (1 - bad_rate) ** size)


def _kept(counts: Counts, chosen: np.ndarray) -> Counts:
    rates = {
        bp: {name: tuple(arm[chosen] for arm in arms) for name, arms in metrics.items()}
        for bp, metrics in counts.rates.items()
    }
    return Counts(rates, {name: tuple(arm[chosen] for arm in outcomes) for name, outcomes in counts.pairs.items()})  # type: ignore[misc]


def _joined(parts: list[Counts]) -> Counts:
    def stacked(pieces: list[tuple[Any, ...]]) -> Any:
        return tuple(np.concatenate(arms) for arms in zip(*pieces, strict=True))

    first = parts[0]
    rates = {
        bp: {name: stacked([part.rates[bp][name] for part in parts]) for name in metrics}
        for bp, metrics in first.rates.items()
    }
    return Counts(rates, {name: stacked([part.pairs[name] for part in parts]) for name in first.pairs})
