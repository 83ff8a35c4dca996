"""The primary metric: what it gives, what it refuses, and that ties and zeros do not make the verdict too sure.

CALIBRATION=long runs 1,000 nulls for every metric (`make calibration-test`); otherwise a sample of them.
"""

from __future__ import annotations

import os
import unittest
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from config import EvaluateSection, RunSection
from tests.support import temporary_directory, write_jsonl
from utils.artifacts import files
from utils.cli import resolve
from utils.data.prepared import Prepared
from utils.evaluation import verdict
from utils.evaluation.costs import answering_cost
from utils.evaluation.intervals import Interval, ratio_interval
from utils.evaluation.metrics import own_function, primary, text_scores
from utils.evaluation.verdict import Scores, Verdict, judge
from utils.exceptions import ConfigError
from utils.rollout.edge import golden
from utils.rollout.edge.servers import ServerAnswer

IS_LONG = os.environ.get("CALIBRATION") == "long"
NULLS = 1000 if IS_LONG else 60
# a latent quality as each kind of metric shows it: half right; two in a hundred right; mostly 0 with a tail; in steps
SHOWN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "choice_accuracy": lambda z: (z > 0).astype(float),
    "exact_match": lambda z: (z > 2).astype(float),
    "f1": lambda z: np.where(z < 0.8, 0.0, np.round(np.clip((z - 0.8) / 2, 0, 1) * 6) / 6),
    "own": lambda z: np.round(np.clip(z / 6 + 0.5, 0, 1) * 5),
}
DESIGNS: dict[str, dict[str, Any]] = {
    "few documents": {"documents": 8, "sizes": (2, 16)},
    "many documents": {"documents": 60, "sizes": (1, 3)},
}


def simulated(
    generator: np.random.Generator,
    kind: str,
    *,
    documents: int = 20,
    sizes: tuple[int, int] = (2, 16),
    gain: float = 0.0,
    span: float | None = None,
) -> Verdict:
    """A verdict on a made-up metric: the domain is kept and the controls are worse, so H3 alone is in question."""
    document = np.repeat(np.arange(documents), generator.integers(*sizes, size=documents))

    def noise(between: float, within: float) -> np.ndarray:
        return generator.normal(size=documents)[document] * between + generator.normal(size=len(document)) * within

    common = noise(0.8, 1.0)
    quality = {name: common + noise(0.2, 0.3) for name in ("composed", "task", *verdict.CONTROLS)}
    quality["composed"] = quality["composed"] + gain
    for name in verdict.CONTROLS:
        quality[name] = quality[name] - 3.0
    clusters, ones = [str(i) for i in document], [1.0] * len(document)
    usual = None if kind == "own" else 1.0
    answers = {
        name: Scores(-SHOWN[kind](values)[None], ones, clusters, usual if span is None else span, ties=True)
        for name, values in quality.items()
    }
    return judge(answers, kept(generator), margin=0.02, resamples=200, seed=int(generator.integers(1 << 30)), unit=kind)


def kept(generator: np.random.Generator) -> dict[str, Scores]:
    """Held-out documents on which nine tenths of the domain are kept."""
    lengths, names = generator.integers(50, 500, size=40).astype(float), [str(i) for i in range(40)]
    base, learnt = 3 + generator.normal(size=40) * 0.4, 0.6 + generator.normal(size=40) * 0.1
    cells = {"base": base, "domain": base - learnt, "composed": base - 0.9 * learnt + generator.normal(size=40) * 0.02}
    return {name: Scores((values * lengths)[None], lengths, names) for name, values in cells.items()}


class Calibration(unittest.TestCase):
    """At most 5 of 100 nulls are called helpful; the simulation of the answers' NLL is in test_evaluation_verdict."""

    def test_helps_comes_up_in_at_most_5_of_100_nulls_of_every_metric(self) -> None:
        for at, kind in enumerate(SHOWN):
            for design, how in DESIGNS.items() if IS_LONG else [list(DESIGNS.items())[at % 2]]:
                with self.subTest(metric=kind, design=design):
                    generator = np.random.default_rng(at)
                    found = Counter(simulated(generator, kind, **how).verdict for _ in range(NULLS))
                    self.assertLessEqual(found["helps"] / NULLS, 0.05, found)

    def test_a_real_gain_is_still_found_in_every_metric(self) -> None:
        for kind in SHOWN:
            generator = np.random.default_rng(7)
            found = [simulated(generator, kind, documents=40, gain=1.5).verdict for _ in range(8)]
            self.assertGreaterEqual(found.count("helps"), 7, kind)

    def test_few_questions_that_differ_are_no_proof(self) -> None:
        # 4 of 160 won and none lost: the sign test says p = 0.125, a bootstrap of what was seen says 0.04
        won = np.zeros(160)
        won[:4] = 1.0
        names = [str(i) for i in range(160)]
        plain, careful = (
            ratio_interval(won, np.ones(160), names, resamples=20_000, seed=0, unseen=unseen) for unseen in (0.0, 1.0)
        )
        self.assertLess(plain.p, 0.06)
        self.assertAlmostEqual(careful.p, 0.125, delta=0.02)
        won[:6] = 1.0  # 6 of 6: the sign test says 0.031
        found = ratio_interval(won, np.ones(160), names, resamples=20_000, seed=0, unseen=1.0)
        self.assertAlmostEqual(found.p, 0.031, delta=0.01)
        self.assertEqual(found.estimate, 6 / 160)

    def test_a_metric_that_is_zero_everywhere_decides_nothing(self) -> None:
        zeros = {n: Scores(np.zeros((1, 90)), [1.0] * 90, [str(i) for i in range(90)], 1.0, ties=True) for n in CELLS}
        found = judge(zeros, kept(np.random.default_rng(0)), margin=0.02, resamples=300, seed=0, unit="F1")
        self.assertEqual(found.verdict, "undecided")
        self.assertIn("the same value", found.sentence)

    def test_no_worse_is_not_shown_by_a_few_questions_without_a_difference(self) -> None:
        # 40 questions of which none differs: as many as 3 in 40 may (rule of three), which is more than the margin
        scores = {n: (np.arange(40) % 2)[None].astype(float) for n in CELLS}
        cells = {n: Scores(-s, [1.0] * 40, [str(i) for i in range(40)], 1.0, ties=True) for n, s in scores.items()}
        found = judge(cells, kept(np.random.default_rng(0)), margin=0.02, resamples=2000, seed=0, unit="F1")
        self.assertFalse(found.holds("H2"), found.contrasts["H2"])
        self.assertTrue(interval_holds(found.contrasts["H2"], 0.03))


CELLS = ("task", "composed", *verdict.CONTROLS)


def interval_holds(found: Interval, least: float) -> bool:
    return found.low < -least < least < found.high


EXAMPLES = [{"id": f"d{i}", "document": f"d{i}", "question": "Who?", "answers": [f"the keeper {i}"]} for i in range(6)]
FUNCTIONS = """
import re
calls = []
def first_words(prediction, example):
    return float(prediction.split()[:2] == example["answers"][0].split()[:2])
def raises(prediction, example):
    return {}["no such key"]
def words(prediction, example):
    return prediction.split()
def nothing(prediction, example):
    return float("nan")
def upside_down(prediction, example):
    return -first_words(prediction, example)
def drifting(prediction, example):
    calls.append(1)
    return len(calls)
half = 0.5
"""


class OwnFunctions(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.root = temporary_directory()
        cls.file = cls.root / "mine.py"
        cls.file.write_text(FUNCTIONS)
        write_jsonl(cls.root / "task_dev.jsonl", EXAMPLES)
        write_jsonl(cls.root / "task_test.jsonl", EXAMPLES)

    def chosen(self, name: str, **settings: Any) -> primary.PrimaryMetric:
        return primary.chosen(EvaluateSection(primary=name, **settings), Prepared(self.root))

    def test_a_function_is_the_value_of_an_answer_and_its_margin_follows_from_dev(self) -> None:
        metric = self.chosen(f"{self.file}:first_words").on(EXAMPLES)
        self.assertTrue(metric.generates)
        self.assertEqual((metric.margin, metric.unit, metric.higher_is_better), (0.02, "first words", True))
        self.assertEqual(metric.value({"name": "d1", "text": "the keeper said so"}), 1.0)
        self.assertEqual(metric.value({"name": "d1", "text": "nobody"}), 0.0)
        self.assertEqual(self.chosen(f"{self.file}:first_words", margin=0.1).margin, 0.1)

    def test_what_it_is_known_by_is_its_file_and_its_name(self) -> None:
        first, other = (self.chosen(f"{self.file}:{name}").recorded for name in ("first_words", "first_words"))
        self.assertEqual(first, other)
        copy = self.root / "copy.py"
        copy.write_text(FUNCTIONS + "\n# changed\n")
        self.assertNotEqual(self.chosen(f"{copy}:first_words").recorded, first)

    def test_a_function_that_cannot_be_used_is_refused_with_the_reason(self) -> None:
        broken, leaves = self.root / "broken.py", self.root / "leaves.py"
        broken.write_text("def metric(prediction, example)\n    return 1\n")
        leaves.write_text("raise SystemExit(3)\n")
        for name, reason in (
            (f"{self.file}:raises", "raises KeyError: 'no such key' (line 7)"),
            (f"{self.file}:words", "returns list and not a number"),
            (f"{self.file}:nothing", "returns nan"),
            (f"{self.file}:upside_down", "does not tell gold answers from empty ones on dev"),
            (f"{self.file}:drifting", "says two things of the same answer"),
            (f"{self.file}:half", "has no function half"),
            (f"{self.file}:missing", "its functions are"),
            (f"{broken}:metric", "cannot be imported: SyntaxError"),
            (f"{leaves}:metric", "cannot be imported: SystemExit: 3 (line 1)"),
            (f"{self.root / 'nowhere.py'}:metric", "no such file"),
        ):
            with self.subTest(name=name), self.assertRaises(ConfigError) as caught:
                self.chosen(name)
            self.assertIn(reason, str(caught.exception))

    def test_choice_accuracy_is_refused_where_nothing_has_choices(self) -> None:
        with self.assertRaises(ConfigError) as caught:
            self.chosen("choice_accuracy")
        self.assertIn("no test question has choices", str(caught.exception))

    def test_a_metric_that_is_none_is_refused_on_the_command_line(self) -> None:
        for written in ("bleu", "mine.py", "mine.py:two words"):
            with self.assertRaises(ConfigError) as caught:
                resolve(["--evaluate.primary", written], {})
            self.assertIn("exact_match", str(caught.exception))

    def test_golden_prompts_follow_the_metric(self) -> None:
        path = self.root / "golden.jsonl"
        write_jsonl(path, [{"question": "Who?", "answers": ["the keeper 1"]}])
        (prompt,) = golden.read(path, "Answer.")
        close, exact = ServerAnswer("a keeper 1", "stop"), ServerAnswer("the keeper", "stop")
        for written, lost in (("answer_nll", -1), ("f1", -1), (f"{self.file}:first_words", 1)):
            _, quality = text_scores.text_score(EvaluateSection(primary=written), [prompt.example])
            self.assertEqual(golden.compare(prompt, close, exact, 0.25, quality)["quality"], lost, written)
        with self.assertRaises(ConfigError):
            text_scores.text_score(EvaluateSection(primary=f"{self.file}:raises"), [prompt.example])

    def test_a_metric_that_fails_in_the_middle_of_a_rollout_is_a_lost_answer_and_not_its_end(self) -> None:
        path, metric = self.root / "golden.jsonl", self.root / "brittle.py"
        write_jsonl(path, [{"question": "How many?", "answers": ["7"]}])
        metric.write_text("def count(prediction, example):\n    return -abs(int(prediction or 99) - 7)\n")
        (prompt,) = golden.read(path, "Answer.")
        _, quality = text_scores.text_score(EvaluateSection(primary=f"{metric}:count"), [prompt.example])
        number, words = ServerAnswer("99", "stop"), ServerAnswer("seven", "stop")
        self.assertEqual(golden.compare(prompt, words, number, 0.25, quality)["quality"], 1)
        self.assertEqual(golden.compare(prompt, number, words, 0.25, quality)["quality"], -1)
        self.assertNotIn("quality", golden.compare(prompt, words, words, 0.25, quality))


class Cost(unittest.TestCase):
    def test_the_dry_run_says_how_many_answers_a_metric_takes(self) -> None:
        root = temporary_directory()
        run = RunSection(data_dir=root / "data", models_dir=root / "models")
        self.assertEqual(answering_cost.lines(EvaluateSection(), run), [])
        self.assertIn("every test question", answering_cost.lines(EvaluateSection(primary="f1"), run)[0])
        directory = root / "prepared"
        directory.mkdir()
        files.seal(directory, {"kind": "prepared", "counts": {"examples": {"test": {"examples": 206}}}})
        settings = EvaluateSection(primary="f1", controls=True, seeds=(1, 2), max_new_tokens=48)
        (line,) = answering_cost.lines(settings, run, str(directory))
        # base once; domain, task, composed, task without domain and three controls for each of three seeds
        self.assertIn(f"{206 * (1 + 3 * 7):,} answers of at most 48 tokens", line)

    def test_a_plain_name_is_no_file(self) -> None:
        self.assertTrue(own_function.is_own("a/b.py:f"))
        self.assertFalse(own_function.is_own("f1"))


if __name__ == "__main__":
    unittest.main()
