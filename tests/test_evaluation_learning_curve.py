"""Would more data help? Coverage on known curves, parts of the data, and the whole of it as a person asks for it."""

from __future__ import annotations

import itertools
import unittest
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from tests.support import WALKS, Workspace, long_walk
from tests.test_evaluation_one_adapter import typed
from utils.artifacts import files
from utils.data.prepared import Prepared
from utils.evaluation.learning_curve import curve, curve_sizes
from utils.evaluation.learning_curve.curve_sizes import DOCUMENTS, PAIRS
from utils.evaluation.learning_curve.power_law import OneDoubling, one_doubling
from utils.exceptions import PipelineError

FIVE, THREE = (25, 50, 100, 200, 400), (100, 200, 400)
QUESTIONS, ABOUT = 200, 40
# a sample in the suite
DRAWS = 500 if WALKS else 80


def scored(curve_of: Callable[[float], float], sizes: tuple[int, ...], draw: int, *, runs: float) -> OneDoubling:
    """Scores with this expected loss per token, of documents that differ and profit differently from more data.

    `runs` is how much the loss of one training run differs from that of another, as a share.
    """
    generator = np.random.default_rng(draw)
    names = np.repeat(np.arange(ABOUT), QUESTIONS // ABOUT)
    tokens = generator.integers(3, 20, QUESTIONS).astype(float)
    hardness = generator.lognormal(-(0.35**2) / 2, 0.35, ABOUT)[names]
    profit = generator.normal(0, 0.03, ABOUT)[names]
    rows = []
    for size in sizes:
        of_item = np.exp(generator.normal(-(0.08**2) / 2, 0.08, QUESTIONS) + profit * np.log2(size / sizes[-1]))
        rows.append(curve_of(size) * tokens * hardness * of_item * np.exp(generator.normal(0, runs)))
    return one_doubling(sizes, np.array(rows), tokens, [str(n) for n in names], resamples=300, seed=draw)


class Coverage(unittest.TestCase):
    """How often the interval holds what twice the data brings, where that is known."""

    def shares(self, curve_of: Callable[[float], float], sizes: tuple[int, ...], runs: float) -> tuple[float, float]:
        """(share of draws whose interval holds the truth, share that does or says that the curve is another one)."""
        truth = curve_of(sizes[-1]) - curve_of(2 * sizes[-1])
        found = [scored(curve_of, sizes, draw, runs=runs) for draw in range(DRAWS)]
        holds = [one.low <= truth <= one.high for one in found]
        said = [held or one.is_bent or one.is_untold for held, one in zip(holds, found, strict=True)]
        return sum(holds) / DRAWS, sum(said) / DRAWS

    def test_a_power_law_is_covered(self) -> None:
        for exponent in (-0.05, -0.15):
            for sizes in (FIVE, THREE):
                for runs in (0.0, 0.01) if DRAWS > 100 else (0.003,):
                    with self.subTest(exponent=exponent, sizes=len(sizes), runs=runs):
                        holds, _ = self.shares(lambda n, e=exponent: 6.0 * n**e, sizes, runs)
                        self.assertGreaterEqual(holds, 0.93)

    def test_nothing_more_to_learn_is_covered(self) -> None:
        holds, _ = self.shares(lambda n: 3.0, FIVE, 0.003)
        self.assertGreaterEqual(holds, 0.93)

    def test_a_curve_of_another_form_widens_the_interval_or_is_said(self) -> None:
        for name, curve_of in (
            ("a floor", lambda n: 2 + 6 * n**-0.5),
            ("a floor that is reached", lambda n: 2.5 + 15 / n),
            ("a late start", lambda n: 3 - 1.2 / (1 + (200 / n) ** 2)),
        ):
            with self.subTest(name):
                for sizes in (FIVE, THREE):
                    _, said = self.shares(curve_of, sizes, 0.003)
                    self.assertGreaterEqual(said, 0.93)
        # what three sizes cannot see is said of all of them
        found = scored(lambda n: 6 * n**-0.15, THREE, 0, runs=0.003)
        self.assertIn("three sizes cannot tell", curve.one_sentence("documents", found))
        self.assertNotIn(
            "three sizes", curve.one_sentence("pairs", scored(lambda n: 6 * n**-0.15, FIVE, 0, runs=0.003))
        )

    def test_shares_of_right_answers_are_covered(self) -> None:
        """An accuracy, whose values tie: most questions stay right or wrong, some turn with each training."""
        for curve_of in (lambda n: 0.8 * (n / 25) ** -0.15, lambda n: 0.5, lambda n: 0.1):
            truth = curve_of(400) - curve_of(800)
            holds = 0
            for draw in range(DRAWS):
                generator = np.random.default_rng(draw)
                names = np.repeat(np.arange(ABOUT), QUESTIONS // ABOUT)
                # normal over all questions: in part a document's, a question's and a training's
                easy = generator.normal(0, 0.2**0.5, ABOUT)[names] + generator.normal(0, 0.6**0.5, QUESTIONS)
                turns = generator.normal(0, 0.2**0.5, (len(FIVE), QUESTIONS))
                bars = [stats.norm.ppf(curve_of(size)) for size in FIVE]
                wrong = np.array([easy + turns[at] < bar for at, bar in enumerate(bars)], dtype=float)
                clusters = [str(n) for n in names]
                how = {"resamples": 300, "seed": draw, "unseen": 1.0}
                found = one_doubling(FIVE, wrong, [1.0] * QUESTIONS, clusters, **how)
                holds += found.low <= truth <= found.high
            self.assertGreaterEqual(holds / DRAWS, 0.93, curve_of(400))

    def test_an_interval_without_the_bend_would_miss_a_floor(self) -> None:
        """The check above can fail: the line alone does not hold the truth."""
        truth = (2 + 6 * 400**-0.5) - (2 + 6 * 800**-0.5)
        found = [scored(lambda n: 2 + 6 * n**-0.5, FIVE, draw, runs=0.003) for draw in range(30)]
        wrong = [abs(one.estimate - truth) for one in found]
        self.assertGreater(np.median(wrong), 0.05)


class Law(unittest.TestCase):
    def test_exponent_and_gain_of_a_law_without_noise(self) -> None:
        loss = np.array([[5.0 * n**-0.2] * 30 for n in FIVE])
        found = one_doubling(FIVE, loss, [1.0] * 30, [str(i) for i in range(30)], resamples=200, seed=0)
        self.assertAlmostEqual(found.exponent, -0.2, places=9)
        self.assertAlmostEqual(found.estimate, 5 * 400**-0.2 - 5 * 800**-0.2, places=9)
        self.assertTrue(found.is_shown)
        np.testing.assert_allclose(found.fitted, found.losses)

    def test_few_documents_or_no_loss_give_no_interval(self) -> None:
        loss = np.array([[5.0 * n**-0.2] * 30 for n in FIVE])
        for values, clusters in ((loss, ["a", "b", "c"] * 10), (0 * loss, [str(i) for i in range(30)])):
            found = one_doubling(FIVE, values, [1.0] * 30, clusters, resamples=200, seed=0)
            self.assertFalse(found.is_shown)
            self.assertEqual((found.low, found.high), (-np.inf, np.inf))
            self.assertIn("not known", curve.one_sentence("pairs", found))
            self.assertIsNone(curve.plain("pairs", found)["low"])

    def test_two_sizes_are_refused(self) -> None:
        with self.assertRaises(ValueError):
            one_doubling((1, 2), np.ones((2, 9)), [1.0] * 9, list("abcdefghi"), resamples=100, seed=0)


class Sizes(unittest.TestCase):
    def test_parts_reach_their_share_and_too_few_are_said(self) -> None:
        self.assertEqual(curve_sizes.part_counts(PAIRS, [1] * 400), [25, 50, 100, 200])
        self.assertEqual(curve_sizes.part_counts(DOCUMENTS, [10, 10, 1000, 10]), [3, 3])
        self.assertIn("too few", curve_sizes.too_few(DOCUMENTS, [3, 3], 4))
        self.assertIn("too few", curve_sizes.too_few(PAIRS, curve_sizes.part_counts(PAIRS, [1] * 32), 32))
        self.assertEqual(curve_sizes.too_few(PAIRS, [25, 50, 100, 200], 400), "")


@long_walk
class Whole(unittest.TestCase):
    """On the toy preset, with a stacked task adapter."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace(documents=64)
        limits = ("--data.max_train_examples", "0", "--data.heldout_share", "0.2")
        typed(cls.place, "prepare_data", *cls.place.sources, *limits)
        typed(cls.place, "train_domain_adapter")
        typed(cls.place, "train_task_adapter")

    def test_the_curve_of_both_kinds(self) -> None:
        found, said = typed(self.place, "evaluate", "--evaluate.learning_curve", "--evaluate.generated_answers", "0")
        kinds = found["learning_curve"]["kinds"]
        self.assertEqual({kind: len(one["sizes"]) for kind, one in kinds.items()}, {"pairs": 5, "documents": 3})
        for kind, one in kinds.items():
            self.assertEqual(one["sizes"], sorted(one["sizes"]))
            self.assertIn(f"twice the {kind}", found["learning_curve"]["sentence"])
            # the largest size is the composed model itself
            self.assertAlmostEqual(one["losses"][-1], found["cells"]["composed"]["answer_nll"], places=9)
            self.assertEqual(len(set(one["losses"])), len(one["losses"]))
        self.assertEqual(list(found["cells"]), ["base", "domain", "composed", "task_without_domain"])
        page = (Path(found["run"]) / "report.html").read_text(encoding="utf-8")
        self.assertIn("Would more data help?", page)
        self.assertIn("one doubling ahead", page)
        self.parts_are_nested_and_leave_the_rest()
        again, said = typed(self.place, "evaluate", "--evaluate.learning_curve", "--evaluate.generated_answers", "0")
        self.assertTrue(again["reused"])
        self.assertNotIn("making", said)

    def parts_are_nested_and_leave_the_rest(self) -> None:
        whole = Prepared(next(path.parent for path in self.place.data.glob("prepared/*/manifest.json")))
        parts = [Prepared(path.parent) for path in self.place.data.glob("controls/prepared/*/manifest.json")]
        sizes = sorted(({e["id"] for e in part.examples("train")} for part in parts), key=len)
        for smaller, larger in itertools.pairwise(sizes):
            self.assertLessEqual(smaller, larger)
        self.assertEqual(len({len(one) for one in sizes}), 5)  # four parts, and the whole of the parts of documents
        corpora = sorted((set(part.documents("corpus")["id"][:]) for part in parts), key=len)
        self.assertLess(len(corpora[0]), len(corpora[1]))
        self.assertLess(corpora[0], corpora[1])
        for part in parts:
            self.assertEqual(part.examples("test"), whole.examples("test"))
            self.assertEqual(
                part.documents("heldout_documents")["id"][:], whole.documents("heldout_documents")["id"][:]
            )
            counted = files.read_manifest(part.directory)["counts"]
            self.assertEqual(counted["examples"]["train"]["examples"], len(part.examples("train")))
            self.assertEqual(counted["documents"]["corpus"]["documents"], len(part.documents("corpus")))

    def test_dry_run_says_what_it_costs(self) -> None:
        done = self.place.run("evaluate", "--evaluate.learning_curve", "--dry-run")
        self.assertIn("4 task adapters on 1/16, 1/8, 1/4 and 1/2 of the pairs", done.stdout)
        self.assertIn("minutes of training at the pace of the newest runs", done.stdout)

    def test_another_metric_is_followed_and_an_own_function_is_refused(self) -> None:
        metric = ("--evaluate.primary", "choice_accuracy", "--evaluate.generated_answers", "0")
        found, _ = typed(self.place, "evaluate", "--evaluate.learning_curve", *metric)
        for one in found["learning_curve"]["kinds"].values():
            self.assertAlmostEqual(one["losses"][-1], 1 - found["cells"]["composed"]["choice_accuracy"], places=9)
        page = (Path(found["run"]) / "report.html").read_text(encoding="utf-8")
        self.assertIn("1 - choice accuracy", page)
        own = self.place.root / "own.py"
        own.write_text("def same(prediction, example):\n    return float(prediction in example['answers'])\n")
        with self.assertRaises(PipelineError) as caught:
            typed(self.place, "evaluate", "--evaluate.learning_curve", "--evaluate.primary", f"{own}:same")
        self.assertEqual(caught.exception.exit_code, 2)
        self.assertIn("--evaluate.primary answer_nll", str(caught.exception))


class Sample(unittest.TestCase):
    """Pairs alone, so that four small trainings are all."""

    def test_the_curve_of_pairs_and_what_it_costs(self) -> None:
        place = Workspace(documents=64)
        limits = ("--data.max_train_examples", "0", "--data.corpus", "none", "--data.task", str(place.task))
        typed(place, "prepare_data", *limits)
        typed(place, "train_task_adapter", "--task.on", "base")
        done = place.run("evaluate", "--evaluate.learning_curve", "--dry-run")
        self.assertIn("4 task adapters on 1/16, 1/8, 1/4 and 1/2 of the pairs", done.stdout)
        self.assertIn("minutes of training at the pace of the newest runs", done.stdout)
        self.assertNotIn("documents", done.stdout.split("learning curve")[1].splitlines()[0])
        found, _ = typed(place, "evaluate", "--evaluate.learning_curve", "--evaluate.generated_answers", "0")
        (one,) = found["learning_curve"]["kinds"].values()
        self.assertEqual(len(one["sizes"]), 5)
        self.assertAlmostEqual(one["losses"][-1], found["cells"]["task"]["answer_nll"], places=9)
        self.assertIn("twice the pairs", found["learning_curve"]["sentence"])


if __name__ == "__main__":
    unittest.main()
