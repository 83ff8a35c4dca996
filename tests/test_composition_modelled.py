"""The search on a model of the losses finds what the search on every real loss finds, and says where it did not."""

from __future__ import annotations

import math
import unittest
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from utils.composition.methods import SUM
from utils.composition.search import ChosenWeights, search
from utils.composition.weights import compass, dev_parts
from utils.composition.weights.points import Keeping, Point, paired
from utils.composition.weights.surface import Surface

ITEMS, DOCUMENTS, TOKENS, OF_PART = 64, 48, 5, 4
# answer and domain loss of one item at weights that differ by the item's own taste
Shape = Callable[[np.ndarray, np.ndarray], float]


class Dev:
    """Losses of many items with tastes of their own, and how often each was asked about."""

    def __init__(self, answer: Shape, domain: Shape, taste: float = 0.15, seed: int = 0, odd_part: float = 0.0):
        generator = np.random.default_rng(seed)
        self.answer, self.domain, self.odd_part = answer, domain, odd_part
        self.of_items = taste * generator.normal(size=(ITEMS, 4))
        self.of_documents = taste * generator.normal(size=(DOCUMENTS, 4))
        self.tokens = generator.integers(3, 9, ITEMS)
        self.whole: list[tuple[str, tuple[float, ...]]] = []
        self.part: list[tuple[str, tuple[float, ...]]] = []
        self.documents: list[tuple[str, tuple[float, ...]]] = []

    def on_all(self, method: str, weights: tuple[float, ...]) -> Point:
        self.whole.append((method, weights))
        return self.point(method, weights, ITEMS, DOCUMENTS)

    def on_documents(self, method: str, weights: tuple[float, ...]) -> Point:
        self.documents.append((method, weights))
        return self.point(method, weights, ITEMS // OF_PART, DOCUMENTS)

    def on_part(self, method: str, weights: tuple[float, ...]) -> Point:
        self.part.append((method, weights))
        return self.point(method, weights, ITEMS // OF_PART, DOCUMENTS // OF_PART)

    def point(self, method: str, weights: tuple[float, ...], items: int, documents: int) -> Point:
        given = np.array(weights if method != SUM else [w for w in weights for _ in range(2)])
        odd = [self.odd_part * (i < ITEMS // OF_PART) * math.sin(3 * given[0]) for i in range(items)]
        nlls = [n * (self.answer(given, t) + o) for n, t, o in zip(self.tokens, self.of_items, odd, strict=False)]
        of_documents = [20 * self.domain(given, t) for t in self.of_documents[:documents]]
        return Point(
            method,
            weights,
            tuple(map(float, nlls)),
            tuple(map(int, self.tokens[:items])),
            tuple(f"d{i % 16}" for i in range(items)),
            tuple(map(float, of_documents)),
            (20,) * documents,
        )

    def everything(self, retention: float = 0.9) -> tuple[Point, Keeping]:
        """What a search finds that measures every setting on all of dev, and what has to be kept."""
        base, domain = self.on_all(SUM, (0.0, 0.0)), self.on_all(SUM, (1.0, 0.0))
        keeping = Keeping(base, domain, retention)
        return compass.best_sum(self.on_all, 2, keeping)[0], keeping


def rounded(x: float) -> float:
    """A valley that is a parabola at its bottom and a slope farther out, as losses are in the weights."""
    return 2 * (math.sqrt(1 + x * x) - 1)


def demo_answer(w: np.ndarray, taste: np.ndarray) -> float:
    domain, task = w[:2].mean() - 1.4 + taste[0], w[2:].mean() - 0.8 + taste[1]
    return 2.0 + 0.9 * rounded(domain) + 0.5 * rounded(task + 0.3 * domain) + 0.25 * math.exp(-2 * w[2:].mean())


def demo_domain(w: np.ndarray, taste: np.ndarray) -> float:
    return 2.6 + rounded(w[:2].mean() - 1.0 + 0.2 * taste[0]) + 0.12 * (1 + taste[1]) * w[2:].mean() ** 2


def level_answer(w: np.ndarray, taste: np.ndarray) -> float:
    """Best at weights that a sum has, so that weights along the depth gain nothing."""
    return 2.0 + rounded(w[:2].mean() - 1.25 + taste[0]) + rounded(w[2:].mean() - 0.75 + taste[1])


def gated_answer(w: np.ndarray, taste: np.ndarray) -> float:
    return demo_answer(w, taste) + rounded(w[3] - w[2] + 1.0 + taste[2])


def rippled_answer(w: np.ndarray, taste: np.ndarray) -> float:
    return demo_answer(w, taste) + 0.4 * math.cos(16 * w[:2].mean()) + 0.4 * math.cos(16 * w[2:].mean())


def found(dev: Dev, methods: tuple[str, ...] = (SUM,), retention: float = 0.9) -> ChosenWeights:
    return search(dev.on_all, 2, methods, retention=retention, on_part=dev.on_part, on_documents=dev.on_documents)


class AsOnEverySetting(unittest.TestCase):
    def test_losses_that_are_no_quadratic_are_searched_to_the_same_or_one_within_its_standard_error(self) -> None:
        for seed in range(12):
            with self.subTest(seed):
                dev = Dev(demo_answer, demo_domain, seed=seed)
                best, keeping = dev.everything()
                real = len(dev.whole)
                dev.whole.clear()
                choice = found(dev)
                sums = [c.point for c in choice.champions if c.label == SUM]
                difference, error = paired(sums[0], best)
                self.assertLessEqual(difference, error)
                self.assertTrue(keeping.surely(choice.chosen) or not keeping.surely(best))
                self.assertIn(choice.chosen, choice.points)
                self.assertEqual(choice.chosen, dev.on_all(choice.chosen.method, choice.chosen.weights))
                spent = len(dev.whole) + len(dev.documents) + len(dev.part) / OF_PART
                self.assertEqual(dev.documents, [(SUM, (0.0, 0.0)), (SUM, (1.0, 0.0))])
                self.assertLess(spent, real / 3, (len(dev.whole), len(dev.part), choice.notes))

    def test_a_method_with_more_weights_is_found_where_it_is_clearly_better_and_costs_little_where_not(self) -> None:
        gate = found(Dev(gated_answer, demo_domain), (SUM, "depth_gate"))
        self.assertEqual(gate.chosen.method, "depth_gate")
        self.assertGreater(gate.chosen.weights[2] - gate.chosen.weights[3], 0.4)
        plain = Dev(level_answer, demo_domain, taste=0.6)
        choice = found(plain, (SUM, "depth_gate"), retention=0.0)
        self.assertEqual(choice.chosen.method, SUM)
        self.assertIn("depth_gate: not better than the sum by a standard error where it was tried", choice.notes)
        self.assertFalse([method for method, _ in plain.whole if method == "depth_gate"])

    def test_what_was_only_measured_on_a_part_is_estimated_for_the_record(self) -> None:
        dev = Dev(demo_answer, demo_domain)
        choice = found(dev)
        self.assertTrue(choice.estimates)
        for point in choice.estimates:
            real = dev.on_all(point.method, point.weights)
            self.assertAlmostEqual(point.answer_nll, real.answer_nll, delta=0.1)
            self.assertAlmostEqual(point.domain_nll or 0.0, real.domain_nll or 0.0, delta=0.1)


class WhereTheModelMisleads(unittest.TestCase):
    def test_real_losses_are_walked_on_and_the_log_says_so(self) -> None:
        dev = Dev(rippled_answer, demo_domain, taste=0.02)
        best, _ = dev.everything()
        choice = found(dev)
        self.assertTrue([note for note in choice.notes if "scored instead of modelled" in note], choice.notes)
        sums = next(c.point for c in choice.champions if c.label == SUM)
        difference, error = paired(sums, best)
        self.assertLessEqual(difference, error)
        smooth = found(Dev(demo_answer, demo_domain, taste=0.02))
        self.assertFalse([note for note in smooth.notes if "scored" in note], smooth.notes)

    def test_a_part_of_dev_that_is_unlike_the_rest_is_noticed_on_all_of_it(self) -> None:
        dev = Dev(demo_answer, demo_domain, taste=0.02, odd_part=1.0)
        best, _ = dev.everything(0.0)
        choice = found(dev, retention=0.0)
        self.assertTrue([note for note in choice.notes if "does not speak for all of it" in note], choice.notes)
        difference, error = paired(choice.chosen, best)
        self.assertLessEqual(difference, error)

    def test_what_loses_too_much_on_all_of_dev_is_not_chosen_however_good_its_part_is(self) -> None:
        class Kind(Dev):
            """Documents of the part lose little by the task's weight, the others much."""

            def point(self, method: str, weights: tuple[float, ...], items: int, documents: int) -> Point:
                made = super().point(method, weights, items, documents)
                more = [5.0 * weights[1] ** 2 * (i >= DOCUMENTS // OF_PART) for i in range(documents)]
                nlls = tuple(n + m for n, m in zip(made.document_nlls, more, strict=True))
                return replace(made, document_nlls=nlls)

        dev = Kind(demo_answer, demo_domain)
        best, keeping = dev.everything()
        choice = found(dev)
        self.assertTrue(keeping.likely(choice.chosen))
        self.assertLessEqual(choice.chosen.answer_nll, best.answer_nll + 0.1)


class Model(unittest.TestCase):
    def test_a_quadratic_is_met_and_measured_points_are_themselves(self) -> None:
        def loss(w: np.ndarray, taste: np.ndarray) -> float:
            return float(2 + (w[0] - 1.2) ** 2 + 0.5 * (w[0] - 1) * (w[2] - 0.5) + 0.3 * (w[2] + taste[0]) ** 2)

        dev = Dev(loss, demo_domain)
        design = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0), (1.5, 1.0), (1.0, 0.5), (1.5, 0.5))
        points = [dev.on_all(SUM, weights) for weights in design]
        model = Surface(SUM, points)
        for point in points:
            self.assertEqual(model.at(SUM, point.weights), point)
        expected, real = model.at(SUM, (1.25, 0.75)), dev.on_all(SUM, (1.25, 0.75))
        self.assertFalse(model.knows(expected))
        for a, b, tokens in zip(expected.answer_nlls, real.answer_nlls, real.answer_tokens, strict=True):
            self.assertAlmostEqual(a / tokens, b / tokens, delta=0.02)
        self.assertEqual(model.near(SUM, (3.0, 0.5)).answer_nll, math.inf)

    def test_the_sum_is_part_of_what_is_known_of_a_method_with_more_weights(self) -> None:
        dev = Dev(demo_answer, demo_domain)
        points = [dev.on_all(SUM, weights) for weights in ((1.0, 1.0), (0.5, 1.0))]
        model = Surface("depth_gate", points)
        self.assertEqual(model.at("depth_gate", (0.5, 0.5, 1.0, 1.0)).answer_nlls, points[1].answer_nlls)


class Items(unittest.TestCase):
    def test_a_part_is_spread_over_dev_and_few_items_are_all_looked_at(self) -> None:
        self.assertEqual(dev_parts.first_scored(7), list(range(7)))
        self.assertEqual(dev_parts.first_scored(100), list(range(0, 100, 4)))
        for count in (0, 1, 13, 51, 69, 200):
            part = dev_parts.first_scored(count)
            self.assertEqual(sorted(set(part)), part)
            self.assertTrue(all(0 <= i < count for i in part))
            self.assertGreaterEqual(len(part), min(count, 12, math.ceil(count / 4)))


if __name__ == "__main__":
    unittest.main()
