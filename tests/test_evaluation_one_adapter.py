"""Only a task adapter or only a domain adapter: each script as a person types it, and what the verdict rests on."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import unittest
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import WALKS, Workspace, long_walk, temporary_directory
from tests.test_evaluation_proof import script
from utils import cli
from utils.artifacts import files
from utils.evaluation import one_adapter
from utils.evaluation.verdict import Scores
from utils.exceptions import PipelineError


class Spoken(logging.Handler):
    """Every event with its facts, as lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.getMessage()} {getattr(record, 'facts', '')}")


def typed(place: Workspace, name: str, *flags: str) -> tuple[dict[str, Any], str]:
    """A script of the workspace in this process: what it returned, and what it said on its way."""
    spoken, root = Spoken(), logging.getLogger("adapters")
    root.addHandler(spoken)
    before = root.level
    root.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = script(name).main(cli.resolve([*place.flags, *flags], {}))
    finally:
        root.removeHandler(spoken)
        root.setLevel(before)
    return found, "\n".join(spoken.lines)


class Alone:
    """The walk through the scripts with one half, which `only` names."""

    only = ""
    place: Workspace
    trained: dict[str, Any]

    def refused(self, name: str, *flags: str) -> str:
        with self.assertRaises(PipelineError) as caught:
            typed(self.place, name, *flags)
        self.assertEqual(caught.exception.exit_code, 2)
        return str(caught.exception)

    @long_walk
    def test_it_is_composed_used_and_merged_alone_with_a_word_about_the_other(self) -> None:
        other = {"task": "domain", "domain": "task"}[self.only]
        used, said = typed(self.place, "inference", "--prompt", "x")
        self.assertEqual(used["adapters"], [self.trained["run"]])
        self.assertIn(f"the {self.only} adapter is used alone: there is no {other} adapter", said)
        self.assertIn(f"train_{other}_adapter.py", said)
        searched, said = typed(self.place, "compose", "--compose.search")
        self.assertEqual((searched["adapters"], list(searched["weights"])), ([self.trained["run"]], [1.0]))
        self.assertIn("nothing to be weighed against", said)
        half, _ = typed(self.place, "compose", "--weights", "0.5")
        self.assertEqual(list(half["weights"]), [0.5])
        target = temporary_directory() / "merged"
        merged, _ = typed(self.place, "inference", "--merge_path", str(target))
        self.assertEqual(merged["adapters"], [self.trained["run"]])
        self.assertEqual(files.verify(target)["composition"]["recipe"]["weights"], [0.5])
        for path in (self.place.models / "composed").glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        missing = self.refused("inference", "--prompt", "x", "--adapters", other)
        self.assertIn(f"{other}_adapter", missing)

    def evaluated(self, *flags: str) -> dict[str, Any]:
        found, _ = typed(self.place, "evaluate", *flags)
        self.assertIn(found["verdict"], ("helps", "hurts", "undecided"))
        self.assertEqual(list(found["cells"]), ["base", self.only])
        results = files.read_json(Path(found["run"]) / "results.json")
        self.assertEqual(results["alone"], self.only)
        page = (Path(found["run"]) / "report.html").read_text(encoding="utf-8")
        self.assertIn("What else it changed", page)
        return results


class TaskAlone(Alone, unittest.TestCase):
    only = "task"

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace()
        typed(cls.place, "prepare_data", "--data.corpus", "none", "--data.task", str(cls.place.task))
        cls.trained, _ = typed(cls.place, "train_task_adapter", "--task.on", "base")

    def test_training_on_what_is_missing_says_how_to_do_without(self) -> None:
        self.assertIn("--task.on base", self.refused("train_task_adapter"))
        self.assertIn("--data.corpus", self.refused("train_domain_adapter"))

    def test_another_metric_decides_and_a_judge_is_refused(self) -> None:
        results = self.evaluated("--evaluate.primary", "f1", "--evaluate.max_new_tokens", "4")
        cells = results["cells"]
        self.assertAlmostEqual(results["changes"]["answers"]["estimate"], cells["task"]["f1"] - cells["base"]["f1"])
        self.assertEqual(results["primary"]["name"], "f1")
        said = self.refused("evaluate", "--evaluate.judge", "http://127.0.0.1:1")
        self.assertIn("there is only a task adapter", said)

    def test_its_answers_are_compared_with_those_of_the_base(self) -> None:
        results = self.evaluated("--evaluate.controls")
        cells, claim = results["cells"], results["contrasts"]["T1"]
        gained = cells["base"]["answer_nll"] - cells["task"]["answer_nll"]
        self.assertAlmostEqual(claim["estimate"], gained, places=9)
        self.assertEqual(results["changes"]["answers"]["estimate"], claim["estimate"])
        self.assertNotIn("held-out documents", results["changes"])
        self.assertIn("controls", results["missing"])


class DomainAlone(Alone, unittest.TestCase):
    only = "domain"

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace(documents=36)
        flags = ("--data.heldout_share", "0.4", "--data.corpus", str(cls.place.corpus))
        cls.prepared, _ = typed(cls.place, "prepare_data", *flags, "--data.task", "none")
        cls.trained, _ = typed(cls.place, "train_domain_adapter")

    def test_training_a_task_adapter_on_no_pairs_says_so(self) -> None:
        self.assertIn("--data.task", self.refused("train_task_adapter"))

    def test_what_is_about_answers_is_refused_in_one_list(self) -> None:
        said = self.refused("evaluate", "--evaluate.primary", "f1", "--evaluate.retrieval", "bm25")
        for flag in ("--evaluate.primary", "--evaluate.retrieval"):
            self.assertIn(f"{flag} scores answers", said)

    def test_too_few_documents_are_told_of_the_claim_that_is_tested(self) -> None:
        found, said = typed(self.place, "evaluate", "--evaluate.max_heldout_documents", "1")
        self.assertIn("whether the domain adapter helps (D1) is not tested", said)
        self.assertIn("--evaluate.max_heldout_documents 7 scores all of them", said)
        page = (Path(found["run"]) / "report.html").read_text(encoding="utf-8")
        for text in (said, page):
            self.assertNotRegex(text, r"\bH1\b")
        self.assertIn("claim D1", page)

    def test_documents_are_compared_and_no_question_is_read(self) -> None:
        seeds = (0, 5) if WALKS else (0,)
        results = self.evaluated(*(("--evaluate.seeds", "5") if WALKS else ()))
        self.assertEqual((results["test_items"], results["reads"]["reads"]), (0, 0))
        cells, claim = results["cells"], results["contrasts"]["D1"]
        gained = cells["base"]["domain_nll"] - cells["domain"]["domain_nll"]
        self.assertAlmostEqual(claim["estimate"], gained, places=9)
        self.assertEqual(cells["domain"]["seeds"], [*seeds])
        self.assertLessEqual({"held-out documents", "documents of the corpus", "plain prose"}, set(results["changes"]))
        self.assertIn(f"{cells['domain']['domain_ppl']:.2f}", results["sentence"])
        self.assertFalse((self.place.models / "evaluation" / ".test_reads.jsonl").exists())


class NothingThere(unittest.TestCase):
    def test_without_any_adapter_both_ways_are_named(self) -> None:
        done = Workspace().run("compose", "--weights", "1,1,1")
        self.assertIn("compose.weights has 3 numbers", done.stderr)
        done = Workspace().run("compose")
        self.assertEqual(done.returncode, 2)
        self.assertIn("train_domain_adapter.py --preset", done.stderr)
        self.assertIn("--task.on base", done.stderr)


class Words(unittest.TestCase):
    """The word that follows from a known difference."""

    def word(self, which: str, shift: float, *, documents: int = 40) -> tuple[str, str]:
        generator = np.random.default_rng(1)
        names = [f"d{i}" for i in range(documents)]
        tokens = [10.0] * documents
        base = {
            what: Scores(generator.normal(30, 1, (1, documents)), tokens, names)
            for what in (self.about(which), "plain prose")
        }
        moved = {
            what: Scores(one.loss_SN - 10 * shift + generator.normal(0, 0.5, (1, documents)), tokens, names)
            for what, one in base.items()
        }
        found = one_adapter.judge(which, one_adapter.changes(base, moved, resamples=2000, seed=0), base, moved)
        return found.verdict, found.sentence

    def about(self, which: str) -> str:
        return one_adapter.ABOUT[which]

    def test_words(self) -> None:
        for which in ("task", "domain"):
            for shift, documents, word in (
                (0.3, 40, "helps"),
                (-0.3, 40, "hurts"),
                (0.0, 40, "undecided"),
                (0.3, 5, "undecided"),
            ):
                with self.subTest(which=which, shift=shift):
                    found, sentence = self.word(which, shift, documents=documents)
                    self.assertEqual(found, word, sentence)
        self.assertIn("it forgets", self.word("domain", -0.3)[1])
        self.assertIn("too few", self.word("task", 0.3, documents=5)[1])

    def test_equal_values_of_another_metric_tell_nothing_and_its_unit_is_said(self) -> None:
        names = [f"d{i}" for i in range(40)]

        def scored(right: Any) -> dict[str, Scores]:
            return {one_adapter.ANSWERS: Scores(-np.array([right], float), [1.0] * 40, names, 1.0, ties=True)}

        base, better = scored([0] * 40), scored([1] * 30 + [0] * 10)
        for ours, word, said in ((base, "undecided", "has the same value"), (better, "helps", "+0.750 exact match")):
            changed = one_adapter.changes(base, ours, resamples=500, seed=0)
            found = one_adapter.judge("task", changed, base, ours, unit="exact match")
            self.assertEqual(found.verdict, word)
            self.assertIn(said, found.sentence)

    def test_nothing_gained_is_rarely_called_help(self) -> None:
        generator, helps = np.random.default_rng(7), 0
        names, tokens = [f"d{i}" for i in range(20)], [10.0] * 20
        for _ in range(200):
            base = {one_adapter.ANSWERS: Scores(generator.gamma(2, 8, (1, 20)), tokens, names)}
            ours = {
                one_adapter.ANSWERS: Scores(
                    base[one_adapter.ANSWERS].loss_SN + generator.standard_t(3, (1, 20)), tokens, names
                )
            }
            found = one_adapter.judge("task", one_adapter.changes(base, ours, resamples=300, seed=1), base, ours)
            helps += found.verdict == "helps"
        self.assertLessEqual(helps, 10)


if __name__ == "__main__":
    unittest.main()
