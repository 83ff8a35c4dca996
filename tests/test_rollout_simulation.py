"""How often the gate is wrong and how soon it is right, by thousands of simulated ramps; other gates fail the same.

Each demand is a function of the gate, so the same ones are run against "always pass" and a peeked z-test, which fail
them with a quarter of the ramps too.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from utils.rollout.gate import Counts
from utils.rollout.policy import UNITS, Policy, RampStep
from utils.rollout.simulation import Gate, RampOutcome, Scenario, our_gate, ramp

POLICY = Policy()
RUNS, RUNS_OF_BAD_GATES = 2000, 500
# 34 or more of 2000 have probability 0.003 when the true rate is exactly 1%
MOST_FALSE_ALARMS = 33
BASE_RATES = (0.001, 0.01, 0.05)
SAME = Scenario(looks=1000)


def same_models_are_not_rolled_back(gate: Gate, runs: int = RUNS) -> None:
    """All metrics together, full ramp, a look after every batch."""
    for base in BASE_RATES:
        _at_most(ramp(replace(SAME, base_rate=base), gate, POLICY, runs=runs, seed=1), f"{base:.1%}")


def a_shared_incident_is_not_blamed_on_the_canary(gate: Gate, runs: int = RUNS) -> None:
    for base in BASE_RATES:
        scenario = replace(SAME, base_rate=base, jump_to=10 * base, looks=300)
        _at_most(ramp(scenario, gate, POLICY, runs=runs, seed=2), f"{base:.1%} -> {10 * base:.1%}")


def clustered_errors_are_not_blamed_on_the_canary(gate: Gate, runs: int = RUNS) -> None:
    for size in (5, 20):
        scenario = replace(SAME, session_requests=size, looks=200)
        _at_most(ramp(scenario, gate, POLICY, runs=runs, seed=3), f"{size} requests a session")


def equal_models_are_promoted(gate: Gate, runs: int = RUNS) -> None:
    for base in BASE_RATES:
        shares = ramp(replace(SAME, base_rate=base), gate, POLICY, runs=runs, seed=4).shares
        _true(shares["promoted"] >= 0.98, f"equal models at {base:.1%}: {shares}")


def twice_the_errors_are_not_promoted(gate: Gate, runs: int = RUNS) -> None:
    for base in (0.01, 0.05):
        shares = ramp(replace(SAME, base_rate=base, ratio=2.0), gate, POLICY, runs=runs, seed=5).shares
        _true(shares["promoted"] <= 0.05, f"twice the errors at {base:.1%}: {shares}")


def bad_candidates_are_found_in_time(gate: Gate, runs: int = RUNS) -> None:
    """At most so many canary units, in 95% of the runs, at 1% and at 10% of the traffic."""
    demands = [
        (Scenario(base_rate=0.01, ratio=2), 5000),
        (Scenario(base_rate=0.01, ratio=5), 550),
        (Scenario(base_rate=0.01, ratio=10), 170),
        (Scenario(base_rate=0.01, ratio=50), 25),
        (Scenario(base_rate=0.05, ratio=2), 1000),
        (Scenario(base_rate=0.05, ratio=4), 170),
        # exceedance of the 95th percentile of lognormal(sigma 0.5) when everything takes 1.5 and 2 times as long:
        # P(Z > 1.645 - ln(f) / 0.5) = 0.203 and 0.398
        (Scenario(slow_ratio=0.203 / 0.05), 160),
        (Scenario(slow_ratio=0.398 / 0.05), 50),
    ]
    for scenario, limit in demands:
        for step in POLICY.steps[:2]:
            per_look = min(20.0, limit / 10)
            asked = replace(scenario, units_per_look=per_look, looks=int(1.5 * limit / per_look), pairs_per_look=0)
            found = ramp(asked, _never_ready(gate), replace(POLICY, steps=(step,)), runs=runs // 2, seed=6)
            in_time = float((found.alarmed & (found.canary_units <= limit)).mean())
            _true(in_time >= 0.95, f"{scenario} at {step.share:.0%}: {in_time:.3f} by {limit} canary units")


def worse_answers_are_found_in_time(gate: Gate, runs: int = RUNS) -> None:
    scenario = Scenario(pairs={"quality": (0.5, 0.9)}, units_per_look=1, looks=160)
    found = ramp(scenario, _never_ready(gate), replace(POLICY, steps=POLICY.steps[:1]), runs=runs // 2, seed=7)
    in_time = float((found.alarmed & (found.pairs_seen <= 80)).mean())
    _true(in_time >= 0.95, f"90% of discordant pairs lost: {in_time:.3f} by 80 pairs")


DEMANDS: list[Callable[..., None]] = [
    same_models_are_not_rolled_back,
    a_shared_incident_is_not_blamed_on_the_canary,
    clustered_errors_are_not_blamed_on_the_canary,
    equal_models_are_promoted,
    twice_the_errors_are_not_promoted,
    bad_candidates_are_found_in_time,
    worse_answers_are_found_in_time,
]


def always_pass(counts: Counts, here: Counts, policy: Policy, step: RampStep) -> tuple[Any, Any]:
    size = len(here.at(step.share_bp, UNITS)[0])
    return np.zeros(size, dtype=bool), np.ones(size, dtype=bool)


def peeked_z_test(counts: Counts, here: Counts, policy: Policy, step: RampStep) -> tuple[Any, Any]:
    """Two proportions at 5%, looked at after every batch, passing after 2000 canary units."""
    (bad_c, bad_p), (all_c, all_p) = here.at(step.share_bp, "errors"), here.at(step.share_bp, UNITS)
    pooled = (bad_c + bad_p) / (all_c + all_p)
    deviation = np.sqrt(np.maximum(pooled * (1 - pooled) * (1 / np.maximum(all_c, 1) + 1 / all_p), 1e-12))
    z = (bad_c / np.maximum(all_c, 1) - bad_p / all_p) / deviation
    return (z > 1.645) & (all_c >= 100), all_c >= 2000


class OurGate(unittest.TestCase):
    def test_it_meets_every_demand(self) -> None:
        for demand in DEMANDS:
            with self.subTest(demand.__name__):
                demand(our_gate)

    def test_errors_counted_per_request_instead_of_per_session_would_be_false_alarms(self) -> None:
        scenario = replace(SAME, session_requests=20, per_request=True, looks=200)
        self.assertGreater(ramp(scenario, our_gate, POLICY, runs=RUNS, seed=3).shares["rolled_back"], 0.03)

    def test_a_ramp_without_traffic_ends_at_the_deadline(self) -> None:
        scenario = Scenario(units_per_look=0, looks=50)
        self.assertEqual(ramp(scenario, our_gate, POLICY, runs=20, seed=8).shares["deadline"], 1.0)


class OtherGates(unittest.TestCase):
    """The demands are no decoration: gates that are known to be bad do not meet them."""

    def failed(self, gate: Gate) -> set[str]:
        found = set()
        for demand in DEMANDS:
            try:
                demand(gate, RUNS_OF_BAD_GATES)
            except AssertionError:
                found.add(demand.__name__)
        return found

    def test_always_pass_fails(self) -> None:
        expected = {
            twice_the_errors_are_not_promoted,
            bad_candidates_are_found_in_time,
            worse_answers_are_found_in_time,
        }
        self.assertEqual(self.failed(always_pass), {demand.__name__ for demand in expected})

    def test_a_peeked_z_test_fails(self) -> None:
        failed = self.failed(peeked_z_test)
        self.assertLessEqual({"same_models_are_not_rolled_back", "equal_models_are_promoted"}, failed)
        self.assertLessEqual({"worse_answers_are_found_in_time"}, failed)


def _never_ready(gate: Gate) -> Gate:
    def held(counts: Counts, here: Counts, policy: Policy, step: RampStep) -> tuple[Any, Any]:
        alarm, _ = gate(counts, here, policy, step)
        return alarm, np.zeros_like(alarm)

    return held


def _at_most(outcome: RampOutcome, where: str) -> None:
    alarms, runs = int(outcome.alarmed.sum()), len(outcome.alarmed)
    limit = MOST_FALSE_ALARMS * runs // RUNS
    _true(alarms <= limit, f"{where}: {alarms} false alarms in {runs} runs, at most {limit}")


def _true(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


if __name__ == "__main__":
    unittest.main()
