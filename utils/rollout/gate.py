"""Counts in, verdict out. Pure: the same counts give the same verdict, whoever asks and however often.

    judge(counts, here, policy, step) -> Verdict("rollback" | "hold" | "advance", findings, reason)

`counts` is everything since the rollout began (alarms), `here` what was seen at the present step (evidence to go on).
A unit is a session, or a request without a session header, and has at most one event per metric: requests of one
session are not independent. Nothing seen is never a reason to advance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from utils.exceptions import DataError, Problem
from utils.rollout import e_process
from utils.rollout.policy import FULL_BP, NEW_UNITS, UNITS, Policy, RampStep

Action = Literal["rollback", "hold", "advance"]
# a bound on production's own rate that is wrong once in a thousand rollouts is a small part of the budget's spirit
BOUND_ALPHA = 1e-3


@dataclass(frozen=True)
class Counts:
    """Cumulative counts; values are integers, or arrays of one shape in simulations.

    rates: share in basis points -> metric or "units" -> (canary, control).   pairs: metric -> (losses, wins, ties).
    """

    rates: Mapping[int, Mapping[str, tuple[Any, Any]]] = field(default_factory=dict)
    pairs: Mapping[str, tuple[Any, Any, Any]] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        rates = {
            bp: _added(self.rates.get(bp, {}), other.rates.get(bp, {})) for bp in sorted({*self.rates, *other.rates})
        }
        return Counts(rates, _added(self.pairs, other.pairs))

    def at(self, share_bp: int, metric: str) -> tuple[Any, Any]:
        return self.rates.get(share_bp, {}).get(metric, (0, 0))

    def units(self) -> tuple[int, int]:
        """Units on (canary, control) over all shares."""
        per_share = [arms.get(UNITS, (0, 0)) for arms in self.rates.values()]
        return sum(c for c, _ in per_share), sum(p for _, p in per_share)

    def to_json(self) -> dict[str, Any]:
        rates = {str(bp): {m: list(arms) for m, arms in metrics.items()} for bp, metrics in self.rates.items()}
        return {"rates": rates, "pairs": {m: list(results) for m, results in self.pairs.items()}}

    @staticmethod
    def from_json(values: Mapping[str, Any], *, whole: bool = True) -> Counts:
        """Raises DataError naming what is not a count: NaN, negative and missing numbers are never taken for 0.

        Without `whole` these are the counts of one tick, where a session counted before may have its first error.
        """
        problems: list[Problem] = []

        def counts(place: str, entry: Any, size: int) -> tuple[int, ...]:
            fits = isinstance(entry, (list, tuple)) and len(entry) == size
            if not fits or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in entry):
                problems.append(Problem(f"{place}: {size} whole numbers from 0", entry))
                return (0,) * size
            return tuple(entry)

        def named(place: str, entry: Any) -> dict[str, Any]:
            if not isinstance(entry, Mapping):
                problems.append(Problem(f"{place}: an object with a name for each", entry))
                return {}
            return dict(entry)

        rates: dict[int, dict[str, Any]] = {}
        for share, metrics in named("rates", values.get("rates") or {}).items():
            if not str(share).isdigit() or not 0 <= int(share) <= FULL_BP:
                problems.append(Problem("rates: the share is 0 to 10000 basis points", share))
                continue
            rates[int(share)] = {
                m: counts(f"rates.{share}.{m}", arms, 2) for m, arms in named(f"rates.{share}", metrics).items()
            }
            units = rates[int(share)].get(UNITS)
            for name, arms in rates[int(share)].items():
                if whole and (units is None or any(event > unit for event, unit in zip(arms, units, strict=True))):
                    problems.append(Problem(f"rates.{share}.{name}: more events than {UNITS}", [arms, units]))
        pairs = {m: counts(f"pairs.{m}", entry, 3) for m, entry in named("pairs", values.get("pairs") or {}).items()}
        if problems:
            raise DataError(problems)
        return Counts(rates, pairs)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Finding:
    """One test: its e-value (as log) against its limit (as log). `reached` is an alarm or wanted evidence."""

    metric: str
    test: Literal["worse", "not worse", "below objective", "share"]
    log_e: float
    log_limit: float

    @property
    def reached(self) -> bool:
        return self.log_e >= self.log_limit


@dataclass(frozen=True)
class GateVerdict:
    """What the counts say, and the tests behind it."""

    action: Action
    reason: str
    findings: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        shown = [
            {"metric": f.metric, "test": f.test, "e_value": _plain(f.log_e), "limit": _plain(f.log_limit)}
            | {"reached": f.reached}
            for f in self.findings
        ]
        return {"action": self.action, "reason": self.reason, "findings": shown}


def judge(counts: Counts, here: Counts, policy: Policy, step: RampStep | None) -> GateVerdict:
    """The verdict at `step`; None is the bake at 100%, where only alarms are looked for."""
    against = [_finding(name, "worse", e, limit) for name, e, limit in alarms(counts, policy)]
    share = None if step is None else _share_finding(here, policy, step)
    findings = [*against, *([share] if share else [])]
    bad = [f for f in findings if f.reached]
    if bad:
        return GateVerdict("rollback", _alarm_text(bad, counts), tuple(findings))
    if step is None:
        return GateVerdict("hold", "no alarm at 100%", tuple(findings))
    conditions = [_finding(*item) for item in evidence(here, counts, policy, step)]
    findings += conditions
    missing = sorted({f.metric for f in conditions} - {f.metric for f in conditions if f.reached})
    if missing:
        return GateVerdict("hold", f"not enough evidence yet: {', '.join(missing)}", tuple(findings))
    return GateVerdict("advance", f"shown not to be worse at {step.share:.2%}", tuple(findings))


def alarms(counts: Counts, policy: Policy) -> list[tuple[str, Any, float]]:
    """Per metric: name, log e-value that the canary is worse, log limit."""
    tests = []
    for metric in policy.rates:
        by_share = [(bp / FULL_BP, counts.at(bp, metric.name)) for bp in counts.rates]
        log_e = e_process.worse_rate(by_share)
        if metric.name == "errors" and FULL_BP in counts.rates:
            # two tests of one metric: their mean is an e-value again, so the metric's part of the budget is kept
            log_e = np.logaddexp(log_e, _without_control(counts, metric.name)) - math.log(2)
        tests.append((metric.name, log_e, math.log(metric.limit)))
    for metric in policy.paired:
        losses, wins, _ = counts.pairs.get(metric.name, (0, 0, 0))
        tests.append((metric.name, e_process.worse_pairs(losses, wins), math.log(metric.limit)))
    return tests


def evidence(here: Counts, counts: Counts, policy: Policy, step: RampStep) -> list[tuple[str, str, Any, float]]:
    """What must be shown before the step is left: (metric, test, log e-value, log limit); one of a metric is enough.

    Errors: at this step the rate is below `ratio` times production's, or below the absolute objective. Answers: over
    all pairs so far, losses do not exceed wins by the step's margin. A fast canary proves nothing, it may be idle.
    """
    limit = math.log(policy.evidence)
    events, seen = here.at(step.share_bp, "errors"), here.at(step.share_bp, UNITS)
    units = np.maximum(seen, events)  # a session that was counted before a restart may err after it
    tests = [("errors", "not worse", e_process.not_worse_rate([(step.share, events)], step.ratio), limit)]
    if policy.objective:
        tests.append(
            ("errors", "below objective", e_process.below_objective(events[0], units[0], policy.objective), limit)
        )
    if policy.needs_quality:
        for metric in policy.paired:
            if metric.name in ("quality", "output"):
                results = counts.pairs.get(metric.name, (0, 0, 0))
                tests.append((metric.name, "not worse", e_process.not_worse_pairs(*results, step.margin), limit))
    return tests


def _without_control(counts: Counts, metric: str) -> Any:
    """At 100% there is no control: against the upper confidence bound of its rate at the earlier steps."""
    before = [bp for bp in counts.rates if 0 < bp < FULL_BP]
    events, units = (sum(counts.at(bp, name)[1] for bp in before) for name in (metric, UNITS))
    return e_process.above_bound(
        counts.at(FULL_BP, metric)[0], counts.at(FULL_BP, UNITS)[0], e_process.upper_bound(events, units, BOUND_ALPHA)
    )


def _share_finding(here: Counts, policy: Policy, step: RampStep) -> Finding:
    drawn = NEW_UNITS if NEW_UNITS in here.rates.get(step.share_bp, {}) else UNITS
    canary, control = here.at(step.share_bp, drawn)
    return _finding("share", "share", e_process.other_share(canary, control, step.share), -math.log(policy.share_alpha))


def _finding(metric: str, test: Any, log_e: Any, log_limit: float) -> Finding:
    return Finding(metric, test, float(log_e), float(log_limit))


def _alarm_text(bad: list[Finding], counts: Counts) -> str:
    worse = ", ".join(f"{f.metric} ({_seen(f, counts)})" for f in bad if f.test == "worse")
    share = [f"the share of traffic is not the one that was set ({_seen(f, counts)})" for f in bad if f.test == "share"]
    return "; ".join(([f"the candidate is worse on {worse}"] if worse else []) + share)


def _seen(finding: Finding, counts: Counts) -> str:
    """The counts behind an alarm, for people."""
    value = f"e-value {_plain(finding.log_e):.3g}, limit {_plain(finding.log_limit):.3g}"
    if finding.metric in counts.pairs:
        losses, wins, ties = counts.pairs[finding.metric]
        return f"{losses} pairs lost, {wins} won, {ties} equal; {value}"
    if finding.test == "share":
        return value
    by_arm = [[counts.at(bp, name) for bp in counts.rates] for name in (finding.metric, UNITS)]
    (bad_c, bad_p), (all_c, all_p) = ([sum(arms[i] for arms in arm_counts) for i in (0, 1)] for arm_counts in by_arm)
    return f"{bad_c} of {all_c} sessions, production {bad_p} of {all_p}; {value}"


def _added(one: Mapping[str, tuple], other: Mapping[str, tuple]) -> dict[str, tuple]:
    names = {**one, **other}
    return {
        name: (
            tuple(a + b for a, b in zip(one[name], other[name], strict=True))
            if name in one and name in other
            else tuple(names[name])
        )
        for name in sorted(names)
    }


def _plain(log_value: float) -> float:
    """exp, capped: an e-value of 1e300 is as good as infinite and stays JSON."""
    return math.exp(min(log_value, 690.0))
