"""Fair controls: each reads as many documents as the judged adapter, of its own domain; the baseline has its weight."""

from __future__ import annotations

import contextlib
import functools
import io
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import Workspace, last_json, write_jsonl
from tests.test_evaluation_proof import script
from utils import cli
from utils.artifacts import files
from utils.composition import search
from utils.composition.weights.points import Point
from utils.evaluation import baseline_weight, scored_rows
from utils.training.keeping import keep_decision

FEW = ["--evaluate.generated_answers", "0", "--evaluate.resamples", "100", "--evaluate.max_heldout_documents", "6"]
ASKED = ["--compose.max_dev_items", "12", "--compose.max_dev_documents", "6", "--compose.search_methods", "sum"]


@functools.cache
def compared() -> tuple[Workspace, dict[str, dict[str, Any]], dict[str, Any]]:
    """A stacked adapter that decided to replay, its weights searched, with every control."""
    place = Workspace()
    place.run("prepare_data", *place.sources, "--data.heldout_share", "0.4")
    reported = {"domain": last_json(place.run("train_domain_adapter", "--domain.train.epochs", "6"))}
    keep = ["--task.keep_domain", "auto", "--compose.domain_retention", "1"]
    keep += ["--task.train.learning_rate", "0.03", "--task.train.epochs", "3"]
    reported["task"] = last_json(place.run("train_task_adapter", *keep))
    reported["composed"] = last_json(place.run("compose", "--compose.search", *ASKED))
    rows = [{"id": f"o{i}", "text": f"The {i}th boat sailed on a {i * 7}-mile river at dawn."} for i in range(40)]
    other = write_jsonl(place.root / "other.jsonl", rows)
    flags = [*place.flags, "--evaluate.controls", "--evaluate.wrong_corpus", str(other), *FEW]
    with contextlib.redirect_stdout(io.StringIO()):
        found = script("evaluate").main(cli.resolve(flags, {}))
    return place, reported, files.read_json(Path(found["run"]) / "results.json")


class FairControls(unittest.TestCase):
    def manifests(self, *folders: str) -> list[dict[str, Any]]:
        place, _, _ = compared()
        return [files.read_json(p) for folder in folders for p in place.models.glob(f"{folder}/*/manifest.json")]

    def test_every_control_reads_as_many_documents_of_its_own_domain_from_the_same_step(self) -> None:
        _, reported, results = compared()
        judged = files.read_manifest(Path(reported["task"]["run"]))
        keeping = judged["measured"]["keeping"]
        self.assertEqual((keeping["how"], results["keeping"]), ("replay", keeping))
        own = judged["identity"]["keep_domain"]["documents"]
        (wrong,) = [run for run in self.manifests("controls/domain") if run["identity"].get("control") != "random"]
        (random,) = [run for run in self.manifests("controls/domain") if run["identity"].get("control") == "random"]
        other = next(parent["digest"] for parent in wrong["parents"] if parent["kind"] == "prepared")
        self.assertNotEqual(own, other)
        found: dict[str, Any] = {}
        for run in self.manifests("controls/task"):
            below, rank = run["identity"]["domain_adapter"], run["identity"]["lora"]["rank"]
            name = {wrong["digest"]: "wrong", random["digest"]: "random"}.get(below, f"base {rank}")
            found.setdefault(name, []).append(run)
        rank = judged["identity"]["lora"]["rank"]
        domain_rank = files.read_manifest(Path(reported["domain"]["run"]))["identity"]["lora"]["rank"]
        expected = {"wrong": [other], "random": [own], f"base {rank}": [None, own], f"base {rank + domain_rank}": [own]}
        self.assertEqual(
            {k: sorted(self.documents(run) or "" for run in runs) for k, runs in found.items()},
            {k: sorted(v or "" for v in wanted) for k, wanted in expected.items()},
        )
        for runs in found.values():
            for run in runs:
                if self.documents(run):
                    told = run["identity"]["keep_domain"]
                    self.assertEqual((told["how"], told["share"]), (keeping["how"], keeping["share"]))
                    self.assertEqual(told["from_step"], keeping["from_step"])
                    self.assertEqual(run["measured"]["steps"], judged["measured"]["steps"])
        # windows have no fixed number of labels, so the same tokens are nearly the same number of labels
        (same,) = [run for run in found[f"base {rank}"] if self.documents(run)]
        self.assertEqual(same["measured"]["trained_tokens"], judged["measured"]["trained_tokens"])

    def documents(self, run: dict[str, Any]) -> str | None:
        return run["identity"].get("keep_domain", {}).get("documents")

    def test_rows_without_it_stand_beside_and_the_report_says_what_was_decided(self) -> None:
        _, _, results = compared()
        self.assertIn("task_plain", results["cells"])
        self.assertNotEqual(results["cells"]["task_plain"]["answer_nll"], results["cells"]["task"]["answer_nll"])
        said = " ".join(results["cautions"])
        self.assertIn("replay (after", said)
        self.assertIn("has a weight chosen on dev too", said)

    def test_the_baseline_has_the_weight_that_dev_chose_on_the_questions_that_composed_had(self) -> None:
        _, reported, results = compared()
        (weight,) = results["baseline_weight"]["chosen"]["weights"]
        searched = [point["weights"][0] for point in results["baseline_weight"]["points"]]
        self.assertLessEqual({0.5, 1.0, 1.5, weight}, set(searched))
        self.assertEqual("task_at_1" in results["cells"], weight != 1.0)
        composed = files.read_manifest(Path(reported["composed"]["composed"]))["identity"]
        evaluated = next(run["identity"] for run in self.manifests("evaluation"))
        wanted = {"max_dev_items": 12, "seed": 0, "data": composed["data"]}
        self.assertEqual(evaluated["baseline_weight"], wanted)


class Weight(unittest.TestCase):
    def point(self, weight: float, *, best: float, noise: float) -> Point:
        nlls = tuple(10 + (weight - best) ** 2 + noise * weight * (-1) ** i for i in range(20))
        return Point("sum", (weight,), nlls, (1,) * 20, tuple(f"d{i}" for i in range(20)))

    def test_the_best_weight_is_found_and_1_is_kept_where_dev_cannot_tell(self) -> None:
        asked: list[float] = []

        def evaluate(best: float, noise: float) -> Any:
            def measure(method: str, weights: tuple[float, ...]) -> Point:
                asked.append(weights[0])
                return self.point(weights[0], best=best, noise=noise)

            return measure

        self.assertEqual(search.search_alone(evaluate(0.62, 0.0)).chosen.weights, (0.625,))
        self.assertEqual(len(asked), len(set(asked)), "a weight was measured twice")
        self.assertEqual(search.search_alone(evaluate(0.9, 3.0)).chosen.weights, (1.0,))

    def test_the_row_is_scaled_and_the_one_at_1_stands_beside(self) -> None:
        factors = {"m": mock.Mock(scale=2.0, a_rI=None, b_Or=None)}
        family = mock.Mock(baseline="run")
        with mock.patch.object(scored_rows.adapter_files, "load", return_value=factors):
            for weight, at_1 in ((0.5, True), (1.0, False)):
                parts = mock.Mock(alone=None)
                parts.baseline_weight.chosen.weights = (weight,)
                with mock.patch.object(family, "baseline", mock.Mock(adapter="x")):
                    row = scored_rows._factors("task", family, mock.Mock(), parts)
                    beside = scored_rows._factors("task_at_1", family, mock.Mock(), parts)
                self.assertEqual(row["m"].scale, 2.0 * weight)
                self.assertEqual(beside is not None, at_1)
                if beside:
                    self.assertEqual(beside["m"].scale, 2.0)

    def test_without_a_search_nothing_is_searched_and_identities_stay(self) -> None:
        for composed in (None, mock.Mock(run=None), mock.Mock(searched=False)):
            self.assertIsNone(baseline_weight.search_of(mock.Mock(composed=composed)))
        self.assertEqual(keep_decision.OFF.how, "off")


if __name__ == "__main__":
    unittest.main()
