"""Several domains and tasks: which pairs are judged, what is said of the others, and that all pairs are one family."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.support import Workspace, long_walk, write_jsonl
from tests.test_evaluation_one_adapter import typed
from utils.artifacts import files
from utils.evaluation import verdict
from utils.evaluation.matrix import matrix, matrix_report, matrix_scores
from utils.evaluation.matrix.matrix_runs import AdapterPair, MatrixRuns
from utils.evaluation.matrix.matrix_scores import DOCUMENTS, QUESTIONS, Scored, name_of, questions_of, to_score
from utils.evaluation.metrics.primary import ANSWER_NLL
from utils.exceptions import PipelineError


class OnePair(unittest.TestCase):
    """The sample that is in the suite: a domain adapter and a task adapter on the base."""

    def test_a_pair_that_was_composed_has_its_weights(self) -> None:
        place = Workspace(documents=30)
        typed(place, "prepare_data", *place.sources, "--data.heldout_share", "0.3")
        typed(place, "train_domain_adapter")
        typed(place, "train_task_adapter", "--task.on", "base")
        typed(place, "compose", "--task.on", "base", "--weights", "0.5,0.75")
        found, _ = typed(place, "evaluate", "--evaluate.matrix", "--evaluate.primary", "choice_accuracy")
        (pair,) = found["pairs"]
        self.assertEqual((pair["weights"], pair["baseline_weight"]), ([0.5, 0.75], 1.0))
        self.assertIn("H4", pair["untested"])
        self.assertEqual(pair["gain"]["clusters"], pair["contrasts"]["H2"]["clusters"])
        page = (Path(found["run"]) / "report.html").read_text(encoding="utf-8")
        self.assertIn("choice accuracy, accuracy", page)


@long_walk
class Matrix(unittest.TestCase):
    """Two domains; a task adapter stacked on the first, one on the base, one ready for any."""

    place: Workspace

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = place = Workspace(documents=30)
        other = place.root / "boats.jsonl"
        rows = [{"id": f"o{i}", "text": f"The {i}th boat sailed on a {i * 7}-mile river at dawn."} for i in range(40)]
        write_jsonl(other, rows)
        share = ("--data.heldout_share", "0.3")
        typed(place, "prepare_data", "--data.corpus", str(other), "--data.task", "none", *share)
        typed(place, "train_domain_adapter", "--run.name", "boats")
        typed(place, "prepare_data", *place.sources, *share)
        typed(place, "train_domain_adapter", "--run.name", "functions")
        typed(place, "train_task_adapter", "--run.name", "stacked")
        typed(place, "train_task_adapter", "--run.name", "alone", "--task.on", "base")
        typed(place, "train_task_adapter", "--run.name", "ready", "--task.on", "domain_ready")

    def pairs(self, found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
        return {(pair["task"], pair["domain"]): pair for pair in found["pairs"]}

    def test_every_pair_is_judged_or_says_why_not(self) -> None:
        found, _ = typed(self.place, "evaluate", "--evaluate.matrix")
        pairs = self.pairs(found)
        self.assertEqual(len(pairs), 6)
        empty = {pair for pair, one in pairs.items() if one["why_empty"]}
        self.assertEqual(empty, {("stacked", "boats")})
        self.assertIn("trained on functions", pairs["stacked", "boats"]["why_empty"])
        for pair, one in pairs.items():
            if pair not in empty:
                self.assertIn(one["verdict"], ("coexists", "interferes", "undecided"))
                self.assertIsNotNone(one["gain"], pair)
        # documents are those of the pair's own domain
        clusters = {pair: (one.get("contrasts", {}).get("H1") or {}).get("clusters") for pair, one in pairs.items()}
        self.assertEqual(len({clusters[task, "boats"] for task in ("alone", "ready")} - {None}) <= 1, True)
        page = (Path(found["run"]) / "report.html").read_text(encoding="utf-8")
        for said in ("Heat map", "trained on functions and works on that one alone", "--s:"):
            self.assertIn(said, page)
        results = files.read_json(Path(found["run"]) / "results.json")
        self.assertIn("the best of them looks better than it is", " ".join(results["cautions"]))
        self.assertEqual(results["reads"]["models"], 5)
        again, _ = typed(self.place, "evaluate", "--evaluate.matrix")
        self.assertTrue(again["reused"])

    def test_named_adapters_and_the_same_numbers_as_the_evaluation_of_the_pair(self) -> None:
        models = self.place.models
        named = ("--evaluate.matrix_domain", str(models / "domain/functions"))
        found, _ = typed(self.place, "evaluate", *named, "--evaluate.matrix_task", str(models / "task/alone"))
        ((_, one),) = self.pairs(found).items()
        alone, _ = typed(
            self.place,
            "evaluate",
            "--task_adapter",
            str(models / "task/alone"),
            "--domain_adapter",
            str(models / "domain/functions"),
            "--evaluate.generated_answers",
            "0",
        )
        for claim in ("H2", "H3"):
            self.assertAlmostEqual(one["contrasts"][claim]["estimate"], alone["contrasts"][claim]["estimate"], places=5)

    def test_what_cannot_take_part_is_refused_all_at_once(self) -> None:
        for flags, said in (
            (
                ("--evaluate.matrix_domain", f"{self.place.models / 'task/alone'},nowhere"),
                ("this is a task run", "nowhere"),
            ),
            (
                ("--evaluate.matrix", "--evaluate.controls", "--evaluate.seeds", "3", "--evaluate.retrieval", "bm25"),
                ("--evaluate.controls", "--evaluate.seeds", "--evaluate.retrieval"),
            ),
            (("--evaluate.matrix", "--evaluate.primary", "field_f1"), ("no expected answer is a JSON object",)),
        ):
            with self.assertRaises(PipelineError) as caught:
                typed(self.place, "evaluate", *flags)
            self.assertEqual(caught.exception.exit_code, 2)
            for part in said:
                self.assertIn(part, str(caught.exception))


def run(name: str, kind: str, on: str = "base") -> Any:
    one = mock.Mock(digest=name.rjust(8, "0"), directory=Path(f"/{name}"))
    one.manifest = {"kind": kind, "identity": {"on": on, "seed": 0}, "parents": []}
    return one


class Family(unittest.TestCase):
    """Pairs in which nothing was gained: at most 5% of matrices call any of them more than undecided by H3."""

    def test_pairs_share_one_level(self) -> None:
        domains, tasks = [run(f"d{i}", "domain") for i in range(3)], [run(f"t{i}", "task") for i in range(3)]
        data = {one.digest: run("data", "prepared") for one in (*domains, *tasks)}
        pairs = tuple(AdapterPair(d, t) for d in domains for t in tasks)
        found = MatrixRuns(tuple(domains), tuple(tasks), pairs, data, {t.digest: t for t in tasks})
        config = mock.Mock()
        config.evaluate.resamples, config.evaluate.margin, config.run.seed = 300, 0.05, 0
        wrong = alone = 0
        for draw in range(60):
            raw = self.nothing_gained(found, np.random.default_rng(draw))
            judged = matrix._judged(config, found, raw, {})
            wrong += any(one.holds("H3") for one in judged.values())
            alone += any(one.contrasts["H3"].p < verdict.LEVEL for one in judged.values())
        self.assertLessEqual(wrong, 6)
        self.assertGreater(alone, 8)  # each on its own level would be wrong far more often

    def nothing_gained(self, found: MatrixRuns, generator: np.random.Generator) -> dict[Scored, dict[str, Any]]:
        raw = {}
        for pair in found.pairs:
            asked = questions_of(pair.task, found.data[pair.task.digest])
            for row in ("base", name_of(pair.task), name_of(pair)):
                losses = 20 + generator.normal(0, 2, 24)
                items = [
                    {"name": f"q{i}", "answer_nll": loss, "answer_tokens": 8, "document": f"m{i}"}
                    for i, loss in enumerate(losses)
                ]
                raw.setdefault(Scored(row, QUESTIONS, asked), {"items": items})
        return raw

    def test_each_row_is_wanted_once(self) -> None:
        domains, tasks = [run(f"d{i}", "domain") for i in range(2)], [run(f"t{i}", "task") for i in range(2)]
        data = {one.digest: run("data", "prepared") for one in (*domains, *tasks)}
        pairs = (
            *(AdapterPair(d, t) for d in domains for t in tasks[:1]),
            AdapterPair(domains[0], tasks[1], why_empty="no"),
        )
        found = MatrixRuns(tuple(domains), tuple(tasks), pairs, data, {t.digest: t for t in tasks})
        rows = [one.row for one in to_score(found, {}) if one.what == QUESTIONS]
        self.assertEqual(sorted(rows), sorted(["base", name_of(tasks[0]), name_of(pairs[0]), name_of(pairs[1])]))
        self.assertFalse([one for one in to_score(found, {}) if one.what == DOCUMENTS])

    def test_a_baseline_has_the_weight_that_was_chosen_for_its_pair(self) -> None:
        domains, tasks = [run(f"d{i}", "domain") for i in range(2)], [run("t", "task")]
        data = {one.digest: run("data", "prepared") for one in (*domains, *tasks)}
        pairs = tuple(AdapterPair(d, tasks[0]) for d in domains)
        found = MatrixRuns(tuple(domains), tuple(tasks), pairs, data, {tasks[0].digest: tasks[0]})
        weights = {name_of(pairs[1]): 0.5}
        task = name_of(tasks[0])
        self.assertIn(f"{task}@0.5", [one.row for one in to_score(found, weights)])
        on = matrix_scores.states(found, weights)
        self.assertEqual((on[task], on[f"{task}@0.5"]), ({task: 1.0}, {task: 0.5}))
        # the first pair is worse than its baseline at weight 1, the second better than its own at 0.5
        values = {task: 1.0, f"{task}@0.5": 3.0, name_of(pairs[0]): 2.0, name_of(pairs[1]): 2.0, "base": 4.0}
        asked = questions_of(tasks[0], data[tasks[0].digest])
        raw = {
            Scored(row, QUESTIONS, asked): {
                "items": [
                    {"name": f"q{i}", "answer_nll": loss, "answer_tokens": 1, "document": f"m{i}"} for i in range(12)
                ]
            }
            for row, loss in values.items()
        }
        config = mock.Mock()
        config.evaluate.resamples, config.run.seed = 100, 0
        judged = matrix._judged(config, found, raw, weights)
        gains = [judged[name_of(pair)].contrasts["H3"].estimate for pair in pairs]
        self.assertEqual(gains, [-1.0, 1.0])


class Page(unittest.TestCase):
    def test_hostile_names_are_escaped_and_a_gap_says_why(self) -> None:
        gain = {"estimate": 0.2, "low": 0.1, "high": 0.3}
        pair = {"domain": "<b>d", "task": "t", "why_empty": "", "verdict": "coexists", "sentence": "s", "gain": gain}
        pair |= {"retention": None, "weights": [1.0, 1.0], "contrasts": {}}
        gap = {"domain": "e", "task": "t", "why_empty": "it <i>works</i> elsewhere"}
        one = {"name": "t", "on": "base", "path": "/t", "digest": "0" * 64, "alone": "itself"}
        domains = [{**one, "name": name} for name in ("<b>d", "e")]
        shown = {"domains": domains, "tasks": [one], "pairs": [pair, gap], "primary": ANSWER_NLL.to_json()}
        results = {"matrix": shown}
        results |= {"cautions": [], "command": "python x"}
        page = matrix_report.page("run", results)
        self.assertNotIn("<b>d", page)
        self.assertIn("it &lt;i&gt;works", page)
        self.assertIn("--s:60%", page)
        self.assertIn("it <i>works</i> elsewhere", matrix.table(results))


if __name__ == "__main__":
    unittest.main()
