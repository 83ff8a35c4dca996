"""The verdict: it follows from the contrasts, seldom says "helps" for nothing, and sees what is there.

Rates are of hundreds of simulated comparisons; `make proof-test` takes twice as many and more of most.
"""

from __future__ import annotations

import functools
import os
import unittest
from collections import Counter
from typing import Any

import numpy as np

from utils.evaluation import verdict
from utils.evaluation.intervals import MIN_CLUSTERS, holm, ratio_interval
from utils.evaluation.verdict import Scores, Verdict, judge

LONG = os.environ.get("PROOF_TESTS") == "1"
MARGIN = 0.05
DOCUMENTS = 20


def simulated(
    generator: np.random.Generator,
    *,
    gain: float = 0.0,
    over_controls: float = 1.0,
    kept: float = 0.9,
    documents: int = DOCUMENTS,
    unclustered: bool = False,
    unpaired: bool = False,
    resamples: int = 400,
) -> Verdict:
    """A verdict on made-up per-item results: documents of unequal size whose items have an effect in common.

    `unclustered` takes items as independent, `unpaired` compares cells as if their items were different ones.
    """
    sizes = generator.integers(2, 16, size=documents)
    document = np.repeat(np.arange(documents), sizes)
    tokens = generator.integers(4, 30, size=len(document)).astype(float)

    def noise(between: float, within: float) -> np.ndarray:
        return generator.normal(size=documents)[document] * between + generator.normal(size=len(document)) * within

    composed = 2.5 + noise(0.8, 1.0)
    cells = {
        "composed": composed,
        "task": composed + gain + noise(0.2, 0.3),
        "wrong_domain": composed + over_controls + noise(0.2, 0.3),
        "random": composed + over_controls + noise(0.2, 0.3),
    }
    if unpaired:  # the same values, dealt to the items in another order: the pairs are lost
        for name in ("task", "wrong_domain", "random"):
            cells[name] = generator.permutation(cells[name])
    clusters = [str(i) for i in (range(len(document)) if unclustered else document)]
    answers = {name: Scores((values * tokens)[None], tokens, clusters) for name, values in cells.items()}
    lengths = generator.integers(50, 500, size=40).astype(float)
    base, learnt = 3 + generator.normal(size=40) * 0.4, 0.6 + generator.normal(size=40) * 0.1
    heldout = {
        "base": base,
        "domain": base - learnt,
        "composed": base - kept * learnt + generator.normal(size=40) * 0.02,
    }
    names = [str(i) for i in range(40)]
    texts = {name: Scores((values * lengths)[None], lengths, names) for name, values in heldout.items()}
    return judge(answers, texts, margin=MARGIN, resamples=resamples, seed=int(generator.integers(1 << 30)))


def rate(word: str, repeats: int, seed: int, **how: Any) -> float:
    generator = np.random.default_rng(seed)
    return Counter(simulated(generator, **how).verdict for _ in range(repeats))[word] / repeats


@functools.cache
def detectable() -> float:
    """The stated minimum detectable effect of H3 in this design."""
    generator = np.random.default_rng(3)
    return float(np.median([simulated(generator).contrasts["H3"].detectable for _ in range(60)]))


class Calibration(unittest.TestCase):
    """Nulls are the least favourable ones: the domain is kept, the controls are worse, only H3 is untrue."""

    def test_helps_comes_up_in_at_most_5_of_100_nulls(self) -> None:
        self.assertLessEqual(rate("helps", 1000 if LONG else 400, 1), 0.05)

    def test_helps_comes_up_in_at_most_5_of_100_nulls_with_few_documents(self) -> None:
        self.assertLessEqual(rate("helps", 300 if LONG else 150, 2, documents=8), 0.05)

    def test_without_clusters_the_same_nulls_are_called_helpful_too_often(self) -> None:
        self.assertGreater(rate("helps", 300, 1, unclustered=True), 0.075)

    def test_an_effect_of_twice_the_detectable_one_is_found_in_at_least_90_of_100(self) -> None:
        size = 2 * detectable()
        self.assertGreaterEqual(rate("helps", 200 if LONG else 100, 4, gain=size, over_controls=size), 0.90)

    def test_without_pairs_the_same_effect_is_missed_too_often(self) -> None:
        size = 2 * detectable()
        self.assertLess(rate("helps", 100 if LONG else 50, 4, gain=size, over_controls=size, unpaired=True), 0.90)

    def test_the_detectable_effect_is_found_in_about_80_of_100_at_its_own_level(self) -> None:
        # at Holm's strictest step: p below a quarter of 5%
        generator = np.random.default_rng(5)
        found = [
            simulated(generator, gain=detectable()).contrasts["H3"].p < 0.05 / 4 for _ in range(200 if LONG else 100)
        ]
        self.assertTrue(0.70 <= np.mean(found) <= 0.90, np.mean(found))

    def test_a_gain_that_a_wrong_domain_gives_too_is_not_called_helpful(self) -> None:
        self.assertLessEqual(rate("helps", 150 if LONG else 60, 6, gain=2.0, over_controls=0.0), 0.05)

    def test_a_gain_for_which_the_domain_was_lost_is_not_called_helpful(self) -> None:
        self.assertLessEqual(rate("helps", 150, 7, gain=2.0, kept=verdict.RETENTION), 0.05)


class Words(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.generator = np.random.default_rng(0)

    def judged(self, **how: Any) -> Verdict:
        return simulated(self.generator, resamples=2000, documents=60, **how)

    def test_each_verdict_is_said_where_it_is_true(self) -> None:
        self.assertEqual(self.judged(gain=1.0).verdict, "helps")
        self.assertEqual(self.judged(gain=-1.0).verdict, "interferes")
        self.assertEqual(self.judged(gain=1.0, kept=0.3).verdict, "interferes")
        self.assertEqual(self.judged(gain=1.0, over_controls=0.0).verdict, "coexists")
        self.assertEqual(simulated(self.generator, gain=-MARGIN, documents=10).verdict, "undecided")

    def test_sentence_names_what_decided(self) -> None:
        self.assertIn("loses the domain", self.judged(gain=1.0, kept=0.3).sentence)
        self.assertIn("worse than the task adapter alone", self.judged(gain=-1.0).sentence)
        self.assertRegex(self.judged(gain=1.0, over_controls=0.0).sentence, "(wrong-domain|random) adapter")

    def test_signs_are_gains_above_zero_when_composed_is_better(self) -> None:
        found = self.judged(gain=0.8, over_controls=0.4, kept=0.9)
        self.assertAlmostEqual(found.contrasts["H3"].estimate, 0.8, delta=0.15)
        self.assertAlmostEqual(found.contrasts["H4"].estimate, 0.4, delta=0.15)
        self.assertAlmostEqual(found.contrasts["H1"].estimate, 0.9, delta=0.05)
        self.assertEqual(found.contrasts["H2"].null, -MARGIN)

    def test_without_controls_it_never_helps_and_says_what_is_missing(self) -> None:
        cells = small(task=1.0)
        found = judge(cells, documents_of(0.9), margin=MARGIN, resamples=500, seed=0)
        self.assertEqual(found.verdict, "coexists")
        self.assertNotIn("H4", found.contrasts)
        self.assertIn("--evaluate.controls", found.sentence)

    def test_without_held_out_documents_h1_is_untested_and_nothing_is_called_helpful(self) -> None:
        cells = small(task=1.0, wrong_domain=1.0, random=1.0)
        found = judge(cells, {}, margin=MARGIN, resamples=500, seed=0)
        self.assertEqual((found.verdict, set(found.contrasts)), ("undecided", {"H2", "H3", "H4"}))
        self.assertIn("no scores of held-out documents", found.sentence)

    def test_a_domain_adapter_that_learnt_nothing_cannot_be_retained(self) -> None:
        cells = small(task=1.0, wrong_domain=1.0, random=1.0)
        found = judge(cells, documents_of(0.9, learnt=0.0), margin=MARGIN, resamples=500, seed=0)
        self.assertEqual(found.verdict, "undecided")
        self.assertIn("the domain adapter itself is not shown to help", found.untested["H1"])

    def test_questions_about_one_document_decide_nothing(self) -> None:
        cells = {name: Scores(s.loss_SN, s.weights, ["one"] * 40) for name, s in small(task=1.0).items()}
        found = judge(cells, documents_of(0.9), margin=MARGIN, resamples=500, seed=0)
        self.assertEqual(found.verdict, "undecided")
        self.assertIn("about 1 document,", found.sentence)

    def test_the_less_convincing_control_speaks_for_h4(self) -> None:
        for worse, better in (("wrong_domain", "random"), ("random", "wrong_domain")):
            cells = small(task=1.0, **{worse: 2.0, better: 0.1})
            found = judge(cells, documents_of(0.9), margin=MARGIN, resamples=500, seed=0)
            self.assertEqual(found.closest_control, better)
            self.assertAlmostEqual(found.contrasts["H4"].estimate, 0.1, delta=0.05)

    def test_cells_of_different_items_are_refused(self) -> None:
        cells = small(task=1.0)
        cells["task"] = Scores(cells["task"].loss_SN, cells["task"].weights, list(reversed(cells["task"].clusters)))
        with self.assertRaises(ValueError):
            judge(cells, {}, margin=MARGIN, resamples=500, seed=0)


class Seeds(unittest.TestCase):
    def test_equal_seeds_change_nothing(self) -> None:
        top, bottom, names = self.items()
        one = ratio_interval(top, bottom, names, resamples=4000, seed=0)
        three = ratio_interval(np.tile(top, (3, 1)), bottom, names, resamples=4000, seed=0)
        self.assertAlmostEqual(three.low, one.low, places=9)
        self.assertAlmostEqual(three.high, one.high, places=9)
        self.assertEqual((one.seeds, three.seeds), (1, 3))

    def test_what_seeds_differ_by_widens_the_interval_as_the_variance_of_their_mean(self) -> None:
        top, bottom, names = self.items()
        shifts = np.array([-0.3, 0.0, 0.3])
        shifted = top + shifts[:, None] * bottom
        found = ratio_interval(shifted, bottom, names, resamples=20_000, seed=0)
        one = ratio_interval(top, bottom, names, resamples=20_000, seed=0)
        self.assertAlmostEqual(found.estimate, one.estimate, places=9)
        # detectable is proportional to the standard error: squares add
        factor = one.detectable / standard_error(top, bottom, names)
        expected = np.hypot(one.detectable, factor * np.sqrt(np.var(shifts, ddof=1) / 3))
        self.assertAlmostEqual(found.detectable / expected, 1.0, delta=0.05)

    def test_a_cell_without_seeds_is_compared_with_each_seed(self) -> None:
        top, bottom, names = self.items()
        base = Scores(top[None], bottom.tolist(), names)
        ours = Scores(np.stack([top - bottom, top - 3 * bottom]), bottom.tolist(), names)
        found = verdict.gain(base, ours, resamples=500, seed=0)
        self.assertAlmostEqual(found.estimate, 2.0)
        self.assertEqual(found.seeds, 2)

    @staticmethod
    def items() -> tuple[np.ndarray, np.ndarray, list[str]]:
        generator = np.random.default_rng(8)
        names = [str(i) for i in np.repeat(np.arange(25), 4)]
        bottom = generator.integers(5, 20, size=100).astype(float)
        return generator.normal(0.4, 0.5, size=100) * bottom, bottom, names


class PValues(unittest.TestCase):
    def test_p_is_below_5_percent_exactly_when_the_interval_lies_above_the_null(self) -> None:
        generator = np.random.default_rng(9)
        agree = 0
        for _ in range(300):
            values = generator.normal(0.35, 1.0, size=30)
            found = ratio_interval(values, np.ones(30), [str(i) for i in range(30)], resamples=2000, seed=1)
            agree += (found.p < 0.05) == (found.low > 0)
        self.assertGreaterEqual(agree, 294)  # at the border one resample more or less decides

    def test_p_is_uniform_enough_when_nothing_is_there(self) -> None:
        generator = np.random.default_rng(10)
        found = []
        for _ in range(600):
            values = generator.normal(0.0, 1.0, size=12)
            found.append(ratio_interval(values, np.ones(12), [str(i) for i in range(12)], resamples=500, seed=2).p)
        # p is twice one tail: below 0.05 in 2.5% of all cases, below 0.2 in 10%
        self.assertLessEqual(np.mean(np.array(found) < 0.05), 0.04)
        self.assertTrue(0.07 <= np.mean(np.array(found) < 0.2) <= 0.14, np.mean(np.array(found) < 0.2))

    def test_certainty_is_not_limited_by_the_number_of_resamples(self) -> None:
        values = np.random.default_rng(11).normal(5.0, 1.0, size=30)
        found = ratio_interval(values, np.ones(30), [str(i) for i in range(30)], resamples=100, seed=3)
        self.assertLess(found.p, 1e-6)

    def test_few_clusters_give_an_infinite_interval(self) -> None:
        names = [str(i) for i in range(MIN_CLUSTERS - 1)]
        found = ratio_interval(np.ones(len(names)), np.ones(len(names)), names, resamples=100, seed=0)
        self.assertEqual((found.estimate, found.low, found.p), (1.0, -np.inf, 1.0))
        enough = [*names, "more"]
        found = ratio_interval(np.arange(1.0, 1 + len(enough)), np.ones(len(enough)), enough, resamples=100, seed=0)
        self.assertTrue(np.isfinite(found.low))

    def test_holm_multiplies_the_smallest_by_all_and_never_goes_down(self) -> None:
        found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
        expected = {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
        self.assertEqual(list(found), ["a", "b", "c", "d"])
        for name, value in expected.items():
            self.assertAlmostEqual(found[name], value)
        self.assertEqual(holm({"a": 0.9, "b": 0.8}), {"a": 1.0, "b": 1.0})


def small(**gains: float) -> dict[str, Scores]:
    """Forty items of twenty documents: `composed`, and others that are worse by a constant with a little noise."""
    generator = np.random.default_rng(12)
    tokens, names = [10.0] * 40, [str(i // 2) for i in range(40)]
    composed = generator.normal(2.0, 0.3, size=40)
    cells = {"composed": composed, **{n: composed + g + generator.normal(0, 0.05, size=40) for n, g in gains.items()}}
    return {name: Scores(values[None] * 10.0, tokens, names) for name, values in cells.items()}


def documents_of(kept: float, learnt: float = 0.5) -> dict[str, Scores]:
    generator = np.random.default_rng(13)
    base, names = generator.normal(3.0, 0.2, size=20), [str(i) for i in range(20)]
    gains = learnt + generator.normal(0, 0.05, size=20)
    cells = {"base": base, "domain": base - gains, "composed": base - kept * gains}
    return {name: Scores(values[None] * 50.0, [50.0] * 20, names) for name, values in cells.items()}


def standard_error(top: np.ndarray, bottom: np.ndarray, names: list[str]) -> float:
    """Of a ratio of sums over clusters, linearised (Cochran 1977, ch. 6), with Bessel's correction."""
    ids = np.unique(names, return_inverse=True)[1]
    residual = np.bincount(ids, weights=top - top.sum() / bottom.sum() * bottom)
    return float(np.sqrt(len(residual) / (len(residual) - 1) * (residual**2).sum()) / bottom.sum())


if __name__ == "__main__":
    unittest.main()
