"""The report's examples: what a row has answered is not asked again."""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from typing import Any
from unittest import mock

from tests.support import temporary_directory
from utils.evaluation import comparison
from utils.evaluation.report import largest_differences
from utils.evaluation.scored_rows import ModelRow


class Examples(unittest.TestCase):
    def said(self, answered: dict[str, list[str]]) -> tuple[dict[str, dict[str, str]], list[list[str]]]:
        """What the report shows of both rows, and which questions were asked for it."""
        asked: list[list[str]] = []

        def answers_to(shown: Sequence[ModelRow], examples: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
            asked.append([example["id"] for example in examples])
            return {row.cell: [f"{row.cell} now {name}" for name in asked[-1]] for row in shown}

        raw = {
            cell: {"answers": [{"name": name, "text": f"{cell} before {name}"} for name in names]}
            for cell, names in answered.items()
        }
        examples = [{"id": name} for name in "abc"]
        with (
            mock.patch.object(largest_differences, "chosen", return_value={"won": ["a", "b"], "lost": ["c"]}),
            mock.patch.object(largest_differences, "described", lambda names, by_name, scores, said, primary: said),
        ):
            found = comparison._examples(
                mock.Mock(),
                [ModelRow("task", None), ModelRow("composed", None)],
                raw,
                mock.Mock(answer_examples=examples, examples=examples),
                mock.Mock(),
                temporary_directory(),
                answers_to,
            )
        return found["won"], asked

    def test_only_what_a_row_has_not_answered_is_asked(self) -> None:
        said, asked = self.said({"task": ["a", "c"], "composed": ["a", "c"]})
        self.assertEqual(asked, [["b"]])
        self.assertEqual(said["task"], {"a": "task before a", "c": "task before c", "b": "task now b"})

    def test_no_model_is_loaded_where_all_was_answered(self) -> None:
        self.assertEqual(self.said({"task": ["a", "b", "c"], "composed": ["c", "b", "a"]})[1], [])

    def test_a_row_that_answered_nothing_is_asked_everything(self) -> None:
        self.assertEqual(self.said({"task": [], "composed": ["a"]})[1], [["a", "b", "c"]])


if __name__ == "__main__":
    unittest.main()
