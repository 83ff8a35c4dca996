"""The gate and the controller as values: formulas, properties, and a journal that replays to the same state."""

from __future__ import annotations

import json
import math
import unittest
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.exceptions import ConfigError, DataError
from utils.rollout import e_process
from utils.rollout.controller import Decision, Observation, State, advance, begin, replay, share_of
from utils.rollout.gate import Counts, judge
from utils.rollout.policy import FULL_BP, METRICS, UNITS, Metric, Policy

POLICY = Policy(min_step_s=1, bake_s=10, bake_units=20)
STEP = POLICY.steps[0]
GOOD_PAIRS = {"quality": (0, 0, 40), "output": (0, 0, 40)}


def traffic(share_bp: int, units: tuple[int, int], **events: tuple[int, int]) -> Counts:
    return Counts({share_bp: {UNITS: units, **events}})


def healthy(share_bp: int, canary: int = 1500) -> Counts:
    total = canary * FULL_BP // max(share_bp, 1)
    return Counts({share_bp: {UNITS: (canary, total - canary)}}, GOOD_PAIRS)


def walked(state: State, seen: list[Observation], policy: Policy = POLICY) -> list[Decision]:
    decisions = []
    for observation in seen:
        decisions.append(advance(state, observation, policy))
        state = decisions[-1].state
    return decisions


def full_ramp() -> list[Observation]:
    shares = (100, 1000, 5000, FULL_BP)
    return [Observation(10.0 + 20 * i, healthy(share_bp)) for i, share_bp in enumerate(shares)]


class Evidence(unittest.TestCase):
    def test_expectation_under_the_null_is_one_for_every_rate_test(self) -> None:
        n, share = 12, 0.1
        for ratio, log_e in ((1.0, e_process.worse_rate), (3.0, lambda by: e_process.not_worse_rate(by, 3.0))):
            p = share * ratio / (share * ratio + 1 - share)
            x = np.arange(n + 1)
            weights = np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in x])
            self.assertAlmostEqual(float((weights * np.exp(log_e([(share, (x, n - x))]))).sum()), 1.0, places=9)

    def test_expectation_under_the_null_is_one_for_pairs_and_for_the_objective(self) -> None:
        n = 10
        x = np.arange(n + 1)
        half = np.array([math.comb(n, k) / 2**n for k in x])
        self.assertAlmostEqual(float((half * np.exp(e_process.worse_pairs(x, n - x))).sum()), 1.0, places=9)
        at = np.array([math.comb(n, k) * 0.01**k * 0.99 ** (n - k) for k in x])
        self.assertAlmostEqual(float((at * np.exp(e_process.below_objective(x, n, 0.01))).sum()), 1.0, places=9)
        self.assertAlmostEqual(float((at * np.exp(e_process.above_bound(x, n, 0.01))).sum()), 1.0, places=9)
        # one pair that is lost with probability 0.3, won with 0.1: exactly at the margin 0.2
        results = (np.array([1, 0, 0]), np.array([0, 1, 0]), np.array([0, 0, 1]))
        mean = float((np.array([0.3, 0.1, 0.6]) * np.exp(e_process.not_worse_pairs(*results, 0.2))).sum())
        self.assertAlmostEqual(mean, 1.0, places=9)

    def test_three_errors_against_an_error_free_production_are_enough_at_one_percent(self) -> None:
        def e_value(errors: int) -> float:
            return math.exp(e_process.worse_rate([(0.01, (errors, 0))]))

        self.assertLess(e_value(2), 500)
        self.assertGreater(e_value(3), 500)

    def test_without_any_error_three_hundred_units_and_a_little_show_one_percent(self) -> None:
        needed = next(n for n in range(1, 2000) if e_process.below_objective(0, n, 0.01) >= math.log(20))
        # ln 20 / -ln(1 - 0.01) = 298 for the best alternative alone; the mixture pays for not knowing it
        self.assertTrue(298 <= needed <= 450, needed)

    def test_a_bound_is_that_of_clopper_and_pearson(self) -> None:
        self.assertAlmostEqual(float(e_process.upper_bound(0, 100, 0.05)), 1 - 0.05 ** (1 / 100), places=9)
        self.assertEqual(float(e_process.upper_bound(0, 0, 0.05)), 1.0)


class Gate(unittest.TestCase):
    def test_nothing_seen_is_held_and_gives_no_nan(self) -> None:
        for step in (STEP, None):
            verdict = judge(Counts(), Counts(), POLICY, step)
            self.assertEqual(verdict.action, "hold")
            self.assertTrue(all(math.isfinite(f.log_e) for f in verdict.findings))

    def test_each_metric_alone_raises_the_alarm(self) -> None:
        for metric in METRICS:
            if metric.kind == "rate":
                counts = traffic(100, (100, 9900), **{metric.name: (60, 60)})
            else:
                counts = Counts({}, {metric.name: (60, 5, 0)})
            verdict = judge(counts, Counts(), POLICY, STEP)
            self.assertEqual(verdict.action, "rollback", metric.name)
            self.assertIn(metric.name, verdict.reason)

    def test_no_alarm_is_not_enough_to_advance(self) -> None:
        few = Counts({100: {UNITS: (100, 9900)}}, GOOD_PAIRS)
        self.assertEqual(judge(few, few, POLICY, STEP).action, "hold")
        self.assertEqual(judge(healthy(100), healthy(100), POLICY, STEP).action, "advance")
        unknown = replace(healthy(100), pairs={})
        self.assertEqual(judge(unknown, unknown, POLICY, STEP).action, "hold")
        self.assertEqual(judge(unknown, unknown, replace(POLICY, needs_quality=False), STEP).action, "advance")

    def test_a_share_that_is_not_the_one_that_was_set_raises_the_alarm(self) -> None:
        counts = traffic(100, (200, 9800))
        self.assertIn("share", judge(counts, counts, POLICY, STEP).reason)

    def test_errors_at_one_hundred_percent_are_judged_by_productions_earlier_rate(self) -> None:
        before = traffic(5000, (2000, 2000), errors=(20, 20))
        self.assertEqual(
            judge(before + traffic(FULL_BP, (1000, 0), errors=(12, 0)), Counts(), POLICY, None).action, "hold"
        )
        worse = judge(before + traffic(FULL_BP, (1000, 0), errors=(80, 0)), Counts(), POLICY, None)
        self.assertEqual(worse.action, "rollback")

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 30), st.integers(0, 60), st.sampled_from([100, 1000, 5000]))
    def test_more_errors_on_the_canary_never_look_better(self, canary: int, control: int, share_bp: int) -> None:
        def log_e(errors: int) -> float:
            return float(e_process.worse_rate([(share_bp / FULL_BP, (errors, control))]))

        if canary > control * share_bp / (FULL_BP - share_bp):  # below its share one error more is no evidence
            self.assertGreaterEqual(log_e(canary + 1), log_e(canary))

    def test_batches_can_be_split_and_reordered(self) -> None:
        parts = [
            traffic(100, (10, 900), errors=(1, 3)),
            traffic(1000, (50, 450), errors=(0, 2)),
            Counts({}, GOOD_PAIRS),
        ]
        forth, back = Counts(), Counts()
        for one, other in zip(parts, reversed(parts), strict=True):
            forth, back = forth + one, back + other
        self.assertEqual(forth.to_json(), back.to_json())
        self.assertEqual(judge(forth, forth, POLICY, STEP), judge(back, back, POLICY, STEP))

    def test_counts_that_are_none_are_refused_with_their_place(self) -> None:
        bad = [[1], [1, -1], [1, float("nan")], ["1", 2], None, [True, 1]]
        for value in bad:
            with self.assertRaisesRegex(DataError, "rates.100.errors"):
                Counts.from_json({"rates": {"100": {UNITS: [5, 500], "errors": value}}})
        with self.assertRaisesRegex(DataError, "more events than units"):
            Counts.from_json({"rates": {"100": {UNITS: [5, 500], "errors": [6, 0]}}})
        with self.assertRaisesRegex(DataError, "basis points"):
            Counts.from_json({"rates": {"1%": {UNITS: [5, 500]}}})


class PolicyValues(unittest.TestCase):
    def test_the_error_budget_cannot_be_overdrawn(self) -> None:
        self.assertAlmostEqual(math.fsum(metric.alpha for metric in METRICS), Policy().alpha)
        with self.assertRaisesRegex(ConfigError, "add up to 0.011"):
            Policy(metrics=(*METRICS, Metric("more", "rate", 0.001)))

    def test_steps_must_rise_and_stay_below_everything(self) -> None:
        for steps in (POLICY.steps[::-1], (), (replace(STEP, share_bp=FULL_BP),)):
            with self.assertRaisesRegex(ConfigError, "steps must rise"):
                Policy(steps=steps)

    def test_json_gives_the_same_policy(self) -> None:
        self.assertEqual(Policy.from_json(json.loads(json.dumps(POLICY.to_json()))), POLICY)


class Controller(unittest.TestCase):
    def test_a_healthy_candidate_takes_every_step_in_order_and_is_promoted(self) -> None:
        decisions = walked(begin(0), full_ramp())
        self.assertEqual([d.action for d in decisions], ["advance", "advance", "advance", "promote"])
        self.assertEqual([d.share_bp for d in decisions], [1000, 5000, FULL_BP, 0])

    def test_evidence_of_one_step_does_not_count_at_the_next(self) -> None:
        decisions = walked(begin(0), [Observation(10, healthy(100)), Observation(20, Counts())])
        self.assertEqual([d.action for d in decisions], ["advance", "hold"])

    def test_a_rollback_is_final(self) -> None:
        bad = Observation(5, traffic(100, (10, 990), errors=(10, 0)))
        decisions = walked(begin(0), [bad, *full_ramp()])
        self.assertEqual(decisions[0].action, "rollback")
        self.assertTrue(all(d.share_bp == 0 and not d.renew for d in decisions))
        self.assertEqual(decisions[-1].state, decisions[0].state)

    def test_without_traffic_the_deadline_rolls_back_for_want_of_data(self) -> None:
        decisions = walked(begin(0), [Observation(t) for t in (10, POLICY.step_deadline_s + 1)])
        self.assertEqual([d.action for d in decisions], ["hold", "rollback"])
        self.assertIn("insufficient data", decisions[-1].reason)
        self.assertEqual(decisions[-1].state.cause, "undecided")

    def test_data_that_cannot_be_trusted_never_advance_and_do_not_renew_the_lease(self) -> None:
        seen = [
            Observation(10, healthy(100), blind="lines lost"),
            Observation(POLICY.step_deadline_s + 1, blind="lost"),
        ]
        hold, end = walked(begin(0), seen)
        self.assertEqual((hold.action, hold.renew), ("hold", False))
        self.assertEqual((end.action, end.state.cause), ("rollback", "undecided"))

    def test_a_failing_production_holds_and_ends_with_its_own_cause(self) -> None:
        counts = Counts({100: {UNITS: (1500, 148_500), "errors": (750, 74_250)}}, GOOD_PAIRS)
        hold, end = walked(begin(0), [Observation(10, counts), Observation(POLICY.step_deadline_s + 1)])
        self.assertEqual(hold.action, "hold")
        self.assertIn("production itself", hold.reason)
        self.assertEqual((end.action, end.state.cause), ("rollback", "incident"))

    def test_an_interruption_goes_back_to_the_first_step_and_not_for_ever(self) -> None:
        ramp = [Observation(10, healthy(100)), Observation(20, interrupted="balancer restarted")]
        moved, again = walked(begin(0), ramp)
        self.assertEqual((moved.share_bp, again.action, again.share_bp), (1000, "restart", 100))
        after = walked(begin(0), [*ramp, Observation(30)])[-1]
        self.assertEqual(
            (after.action, after.state.step), ("hold", 0), "the step is shown anew, not by what it was before"
        )
        ends = walked(begin(0), [Observation(10.0 + i, interrupted="x") for i in range(POLICY.max_interruptions + 1)])
        self.assertEqual(ends[-1].action, "rollback")

    def test_a_first_error_of_a_session_that_was_counted_before_is_read_back(self) -> None:
        seen = [Observation(1, traffic(100, (5, 95))), Observation(2, Counts({100: {"errors": (1, 0)}}))]
        again = [Observation.from_json(json.loads(json.dumps(observation.to_json()))) for observation in seen]
        self.assertEqual(replay(begin(0), again, POLICY), replay(begin(0), seen, POLICY))

    def test_commands_of_a_person(self) -> None:
        self.assertEqual(walked(begin(0), [Observation(1, command="abort")])[0].state.cause, "person")
        promoted = walked(begin(0), [Observation(1, command="promote")])[0]
        self.assertEqual((promoted.action, promoted.share_bp), ("advance", 1000))
        alarm = traffic(100, (10, 990), errors=(10, 0))
        self.assertEqual(walked(begin(0), [Observation(1, alarm, command="promote")])[0].action, "rollback")

    def test_unsafe_facts_end_it_at_once(self) -> None:
        decision = advance(begin(0), Observation(1, healthy(100), unsafe="another model answers"), POLICY)
        self.assertEqual((decision.action, decision.reason), ("rollback", "another model answers"))

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 400)), max_size=12))
    def test_the_journal_replays_to_the_same_state_through_json(self, ticks: list[tuple[int, int, int]]) -> None:
        state, seen = begin(0.1), []
        for number, (errors, canary, control) in enumerate(ticks):
            share_bp = share_of(state, POLICY)
            counts = traffic(share_bp, (canary + errors, control), errors=(errors, 0)) if share_bp else Counts()
            seen.append(Observation(0.1 + 1.7 * number, counts + Counts({}, {"quality": (0, 1, 9)})))
            state = advance(state, seen[-1], POLICY).state
        lines = [json.dumps(observation.to_json()) for observation in seen]
        again = replay(begin(0.1), (Observation.from_json(json.loads(line)) for line in lines), POLICY)
        self.assertEqual(again, state)
        restored = State.from_json(json.loads(json.dumps(state.to_json())))
        self.assertEqual(restored.to_json(), state.to_json())
        following = Observation(1000.0, healthy(100))
        self.assertEqual(advance(restored, following, POLICY), advance(state, following, POLICY))


if __name__ == "__main__":
    unittest.main()
