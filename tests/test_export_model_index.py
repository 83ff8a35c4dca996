"""Evaluations in model cards: the hub's own format, the numbers of results.json, the right evaluation or none."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any

from tests.report_support import FOUR, digest, evaluation
from tests.support import temporary_directory

# isort: split
# the hub's library reads HF_HUB_OFFLINE when it is imported, so what the tests share comes first
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from tests import test_export_cards_and_hub
from utils.adapters import cards
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.evaluation.evaluation_for_card import Evaluation, evaluation_of
from utils.export import hub
from utils.export.model_index import METRICS, eval_results, with_evaluation

BASE = "b" * 64
RECIPE = {"method": "sum", "weights": [1.25, 0.75], "rank": 0, "density": 0.5, "seed": 0}


def composed_card() -> str:
    made = {
        "method": "sum",
        "source": "Hu et al.",
        "weights": (1.25, 0.75),
        "exact": True,
        "searched": True,
        "check": "fine",
    }
    return cards.composed_card(
        test_export_cards_and_hub.ON_HUB, [test_export_cards_and_hub.DOMAIN, test_export_cards_and_hub.TASK], **made
    )


def found(**kinds: Any) -> Evaluation:
    """An evaluation as the lookup gives it."""
    manifest = {"digest": "a" * 64, "identity": {"dtype": "torch.bfloat16"}}
    return Evaluation(Run(Path("/home/someone/models/evaluation/e1"), manifest), evaluation(FOUR, **kinds))


def adapters(*names: str) -> list[Run]:
    return [Run(Path(name), {"digest": digest(name)}) for name in names]


class Metadata(unittest.TestCase):
    def test_the_hubs_parser_reads_every_number_of_the_composed_row(self) -> None:
        made = found()
        cell = made.results["cells"]["composed"]
        data = ModelCard(with_evaluation(composed_card(), "owner/my name", made)).data
        self.assertEqual(data.model_name, "my-name")
        self.assertEqual(data.eval_results, eval_results(made.results))
        self.assertEqual([one.metric_value for one in data.eval_results], [cell[key] for key in METRICS])
        intervals = [(one.metric_args or {}).get("interval_95") for one in data.eval_results]
        self.assertEqual(intervals, [cell["intervals"][key] for key in METRICS])
        self.assertEqual({one.metric_type for one in data.eval_results}, {metric for _, metric, _ in METRICS.values()})

    def test_the_block_has_what_the_hub_requires(self) -> None:
        header = with_evaluation(composed_card(), "m", found()).split("---\n")[1]
        (model,) = yaml.safe_load(header)["model-index"]
        self.assertEqual(model["name"], "m")
        self.assertEqual([one["dataset"].get("split") for one in model["results"]], ["test", "heldout", None])
        for one in model["results"]:
            self.assertEqual(one["task"]["type"], "text-generation")
            for text in (one["dataset"]["type"], one["dataset"]["name"], *(m["type"] for m in one["metrics"])):
                self.assertRegex(text, r"\S")
            for metric in one["metrics"]:
                self.assertIsInstance(metric["value"], float)
                self.assertNotIn("verified", metric)
        self.assertEqual(len(model_index_to_eval_results([model])[1]), len(METRICS))

    def test_nothing_else_in_the_card_changes(self) -> None:
        before, after = ModelCard(composed_card()), ModelCard(with_evaluation(composed_card(), "m", found()))
        kept = {k: v for k, v in after.data.to_dict().items() if k != "model-index"}
        self.assertEqual(kept, before.data.to_dict())
        self.assertTrue(after.text.startswith(before.text.rstrip("\n") + "\n\n## Evaluation\n"), after.text)

    def test_a_newer_evaluation_takes_the_place_of_the_older_one(self) -> None:
        card = composed_card().replace("## Lineage", "## Evaluation\n\nold\n\n## Lineage")
        other = found()
        other.results["cells"]["composed"]["answer_nll"] = 9.0
        twice = with_evaluation(with_evaluation(card, "m", found()), "m", other)
        self.assertEqual(twice, with_evaluation(composed_card(), "m", other))
        self.assertEqual(twice.count("## Evaluation"), 1)
        self.assertNotIn("\nold\n", twice)

    def test_section_says_the_verdict_the_rows_and_what_they_rest_on(self) -> None:
        made = found()
        text = ModelCard(with_evaluation(composed_card(), "m", made)).text
        cell = made.results["cells"]["composed"]
        low, high = cell["intervals"]["answer_nll"]
        for part in (
            made.results["sentence"],
            f"| **this** | {cell['answer_nll']:.3f} [{low:.3f}, {high:.3f}] |",
            "| task adapter alone |",
            "48 test questions about 16 documents, 2 training seeds",
            "on the base model in bfloat16",
            f"Evaluation `e1`, digest `{'a' * 64}`.",
        ):
            self.assertIn(part, text)

    def test_measures_without_data_are_absent(self) -> None:
        made = found(choices=False, answers=False, heldout=False)
        self.assertEqual([one.metric_type for one in eval_results(made.results)], ["nll", "perplexity"])
        self.assertNotIn("accuracy", with_evaluation(composed_card(), "m", made))

    def test_a_hub_dataset_is_named_at_its_commit_and_a_local_one_without_its_path(self) -> None:
        made = found()
        said = {"task": "org/pairs:easy", "task_revision": "c" * 40, "corpus": ["/home/someone/x/docs", "notes.md"]}
        made.results["dataset"] = {**said, "corpus_revision": ""}
        by_split = {one.dataset_split: one for one in eval_results(made.results)}
        test, heldout = by_split["test"], by_split["heldout"]
        self.assertEqual(
            (test.dataset_type, test.dataset_config, test.dataset_revision), ("org/pairs", "easy", "c" * 40)
        )
        self.assertEqual((heldout.dataset_type, heldout.dataset_name), ("private", "docs, notes.md"))
        for source, revision in (("/home/someone/pairs.jsonl", ""), ("/home/someone/pairs.jsonl", "c" * 40)):
            made.results["dataset"] = {"task": source, "task_revision": revision}
            self.assertNotIn("someone", with_evaluation(composed_card(), "m", made))


class Lookup(unittest.TestCase):
    def setUp(self) -> None:
        self.models = temporary_directory()
        self.results = evaluation(FOUR)
        self.pair = adapters("domain", "task")

    def make(self, name: str, *, sealed: bool = True, base: str = BASE, **composition: Any) -> Path:
        directory = self.models / "evaluation" / name
        directory.mkdir(parents=True)
        results = {**self.results, "composition": self.results["composition"] | composition, "name": name}
        files.write_json(directory / "results.json", results)
        if sealed:
            record = test_export_cards_and_hub.ON_HUB.record() | {"digest": base}
            files.seal(directory, runs.manifest("evaluation", Identity({}), base=record, parents=[], measured={}))
        return directory

    def name(self, **changed: Any) -> str | None:
        asked = {"base_digest": BASE, "adapters": self.pair, "recipe": RECIPE} | changed
        one = evaluation_of(self.models, **asked)
        return one and one.results["name"]

    def test_newest_evaluation_of_the_same_base_adapters_and_recipe_is_found(self) -> None:
        self.assertIsNone(self.name())
        self.make("first")
        self.make("second")
        self.make("unfinished", sealed=False)
        self.make("another base", base="c" * 64)
        self.make("other weights", recipe=RECIPE | {"weights": [1.0, 0.75]})
        self.make("other order", adapters=[digest("task"), digest("domain")])
        self.make("nothing composed", adapters=None)
        self.assertEqual(self.name(), "second")
        self.assertEqual(self.name(recipe=RECIPE | {"weights": (1.0, 0.75)}), "other weights")
        self.assertEqual(self.name(adapters=self.pair[::-1]), "other order")
        self.assertEqual(self.name(base_digest="c" * 64), "another base")
        self.assertIsNone(self.name(recipe=RECIPE | {"method": "ties"}))
        self.assertIsNone(self.name(adapters=[*self.pair, *adapters("third")]))
        self.assertIsNone(self.name(base_digest="d" * 64))

    def test_a_changed_evaluation_is_passed_over_with_a_warning(self) -> None:
        self.make("first")
        path = self.make("second") / "results.json"
        path.write_text(path.read_text(encoding="utf-8").replace('"test_items": 48', '"test_items": 99'))
        with self.assertLogs("adapters", "WARNING") as logged:
            self.assertEqual(self.name(), "first")
        self.assertIn("an evaluation cannot be used", logged.output[0])


class Published(test_export_cards_and_hub.HubTest):
    def test_a_published_card_has_the_evaluation_and_the_sealed_one_stays(self) -> None:
        directory = self.artefact()
        before = files.verify(directory)
        made = found()
        hub.push(directory, test_export_cards_and_hub.HUB, message="m", evaluation=made)
        data = ModelCard(self.taken["README.md"].decode()).data
        self.assertEqual((data.model_name, data.eval_results), ("name", eval_results(made.results)))
        self.assertIn(b'folder, version = "owner/name", None', self.taken["README.md"])
        self.assertIn(b'"rewritten": [\n    "README.md"', self.taken["provenance.json"])
        self.assertEqual(files.verify(directory), before)

    def test_without_an_evaluation_the_card_claims_nothing(self) -> None:
        hub.push(self.artefact(), test_export_cards_and_hub.HUB, message="m")
        self.assertNotIn(b"model-index", self.taken["README.md"])
        self.assertNotIn(b"## Evaluation", self.taken["README.md"])


if __name__ == "__main__":
    unittest.main()
