"""What prepared data will not be enough for is said by prepare_data, with what to do; all problems come at once."""

from __future__ import annotations

import unittest

from config import DataSection
from tests.support import Workspace, write_jsonl
from tests.test_evaluation_one_adapter import typed
from utils.data import early_warnings
from utils.evaluation import intervals
from utils.exceptions import PipelineError


class Sentences(unittest.TestCase):
    def held_out(self, corpus: int, held: int, **settings: object) -> str:
        data = DataSection(**{"corpus": ("docs",), "task": "pairs.jsonl", **settings})
        parts = {"corpus": corpus, "dev_documents": held, "heldout_documents": held}
        return " ".join(early_warnings.held_out(data, parts))

    def test_the_threshold_is_the_one_of_the_intervals(self) -> None:
        self.assertEqual(early_warnings.INTERVAL_DOCUMENTS, intervals.MIN_CLUSTERS)

    def test_each_case_has_a_way_out(self) -> None:
        self.assertEqual(self.held_out(100, 6), "")
        self.assertIn("--data.heldout_share 0.24 ", self.held_out(48, 1))
        self.assertIn("is ignored below 10 documents, there are 9", self.held_out(9, 0))
        self.assertIn("are few", self.held_out(12, 1))
        self.assertIn("keeps the domain (H1)", self.held_out(12, 1))
        self.assertIn("the domain adapter helps (D1)", self.held_out(12, 1, task="none"))
        self.assertIn("give more of them with --data.corpus_heldout", self.held_out(100, 3, corpus_heldout=("x",)))
        self.assertEqual(early_warnings.labelled({"test": {"documents": 6}}), [])
        self.assertEqual(early_warnings.labelled({}), [])
        few = early_warnings.labelled({"test": {"documents": 1}})[0]
        self.assertIn("about 1 of 1 document:", few)
        self.assertNotIn("--data.test_share", few, "no share of one document is enough")
        splits = {"train": {"documents": 26}, "dev": {"documents": 3}, "test": {"documents": 1}}
        self.assertIn("about 1 of 30 documents", early_warnings.labelled(splits)[0])
        self.assertIn("--data.test_share 0.4,", early_warnings.labelled(splits)[0])

    def test_the_share_that_is_named_is_enough(self) -> None:
        for whole in range(24, 400, 7):
            said = self.held_out(whole - 2, 1)
            share = float(said.split("--data.heldout_share ")[1].split()[0])
            held = max(2, round(whole * share))
            self.assertGreaterEqual(held - held // 2, early_warnings.INTERVAL_DOCUMENTS, (whole, share))


class Commands(unittest.TestCase):
    def test_problems_of_documents_and_pairs_come_in_one_list(self) -> None:
        place = Workspace()
        bad = write_jsonl(place.root / "bad.jsonl", [{"nothing": 1}] * 4)
        with self.assertRaises(PipelineError) as caught:
            typed(place, "prepare_data", "--data.corpus", str(place.root / "nowhere"), "--data.task", str(bad))
        said = str(caught.exception)
        self.assertIn("nowhere", said)
        self.assertIn("bad.jsonl", said)
        self.assertEqual(caught.exception.exit_code, 2)
        self.assertFalse(list((place.data / "prepared").glob("*")) if (place.data / "prepared").exists() else [])

    def test_few_documents_are_said_before_they_are_tokenised(self) -> None:
        place = Workspace(documents=8)
        _, said = typed(place, "prepare_data", *place.sources)
        self.assertLess(said.index("is ignored below 10 documents"), said.index("tokenising corpus"))


if __name__ == "__main__":
    unittest.main()
