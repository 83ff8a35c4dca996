"""Many answers: short prompts are answered many at once, long ones few, and each gets its own answer."""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from typing import Any
from unittest import mock

from config import InferenceSection
from tests.support import temporary_directory
from utils.exceptions import DataError
from utils.inference import generation, prompts, scoring
from utils.inference.generation import GeneratedAnswer
from utils.models.parallel import work
from utils.models.rows import row_support
from utils.models.rows.row_support import RowSupport
from utils.planning.fitting_settings import ANSWERING_TOKENS, LEAST_ANSWERS, MOST_ANSWERS, answers_at_once


class Batches(unittest.TestCase):
    def sizes(self, lengths: Sequence[int], support: RowSupport = row_support.PLAIN_ROWS) -> list[int]:
        """How many prompts each batch has; each answer names the length of its prompt."""
        found: list[int] = []

        def answer(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **how: Any) -> list[GeneratedAnswer]:
            found.append(len(prompts))
            self.assertLessEqual(
                max(map(len, prompts)) - min(map(len, prompts)), 900, "long ones are not with short ones"
            )
            return [GeneratedAnswer(str(len(prompt)), 1, True, False) for prompt in prompts]

        examples = [{"id": str(i), "length": length} for i, length in enumerate(lengths)]
        with (
            mock.patch.object(generation, "answer", answer),
            mock.patch.object(
                generation.chat, "prompt_ids", lambda tokenizer, example, system: [1] * example["length"]
            ),
            mock.patch.object(row_support, "of", return_value=support),
        ):
            given = generation.answer_all(None, mock.Mock(), examples, "s", InferenceSection(max_new_tokens=48))
        self.assertEqual([answer.text for answer in given], [str(length) for length in lengths])
        return found

    def test_short_prompts_are_answered_32_at_once_and_long_ones_eight_in_batches_of_like_size(self) -> None:
        self.assertEqual(self.sizes([50, 20] * 16), [32])
        self.assertEqual(self.sizes([50, 20] * 20), [20, 20])
        self.assertEqual(self.sizes([2000] * 20), [6, 7, 7])
        self.assertEqual(self.sizes([50] * 140), [23, 23, 24] * 2, "an even number: two ranks have as much to do")
        self.assertEqual(self.sizes([]), [])
        self.assertEqual(sum(self.sizes([2000, 50] * 20)), 40)
        self.assertEqual(self.sizes([50] * 3, RowSupport(pads_left=False)), [1, 1, 1])

    def test_no_batch_has_more_tokens_than_planned_unless_it_is_as_small_as_can_be(self) -> None:
        for tokens in (1, 64, 128, 200, 512, 513, 100_000):
            count = answers_at_once(tokens)
            self.assertTrue(LEAST_ANSWERS <= count <= MOST_ANSWERS)
            self.assertTrue(count * tokens <= ANSWERING_TOKENS or count == LEAST_ANSWERS, tokens)


class ScoredOnRanks(unittest.TestCase):
    def loads(self, lengths: Sequence[int], count: int, *, sharded: bool = False) -> list[int]:
        """Padded tokens of each rank, of a pass at most 4,096."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        with (
            mock.patch.object(scoring.ranks, "size", return_value=count),
            mock.patch.object(scoring.ranks, "is_sharded", return_value=sharded),
        ):
            groups = scoring._batches(order, [lengths[i] for i in order], 4096)
        self.assertEqual(sorted(i for rows in groups for i in rows), list(range(len(lengths))))
        costs = [len(rows) * lengths[rows[-1]] for rows in groups]
        self.assertLessEqual(max(costs), 4096)
        parts = work.assigned(costs, count, in_step=sharded)
        return [sum(costs[number] for number in part) for part in parts]

    def test_ranks_have_as_much_to_score_also_of_a_set_that_one_pass_would_hold(self) -> None:
        shortest = 60
        for items in (12, 30, 206):
            lengths = [shortest + i * 37 % 190 for i in range(items)]
            for count in (2, 3, 4):
                loads = self.loads(lengths, count)
                self.assertEqual(len(loads), count)
                self.assertLess(max(loads), 1.35 * sum(loads) / count, (items, count, loads))
        self.assertEqual(len(self.loads([100] * 8, 4, sharded=True)), 4)
        self.assertEqual(self.loads([100] * 8, 4, sharded=True), [200] * 4, "in step: one pass each")
        self.assertEqual(self.loads([100] * 8, 1), [800], "one process: one pass")
        self.assertEqual(sorted(self.loads([100, 200, 300], 4)), [0, 100, 200, 300])


class Files(unittest.TestCase):
    def test_a_text_file_has_a_prompt_in_each_line(self) -> None:
        path = temporary_directory() / "questions.txt"
        path.write_text("What is a lock?\n\n  Why?  \n", encoding="utf-8-sig")
        self.assertEqual([row["question"] for row in prompts.read(path)], ["What is a lock?", "  Why?  "])

    def test_columns_are_those_that_labelled_pairs_may_have(self) -> None:
        path = temporary_directory() / "fragen.csv"
        path.write_text("Frage;Kontext;Quelle\nWann?;Im Mai.;a\nWo?;;b\n", encoding="utf-8")
        self.assertEqual(
            [(r["question"], r["context"]) for r in prompts.read(path)], [("Wann?", "Im Mai."), ("Wo?", None)]
        )
        path.write_text("Thema;Quelle\n" + "a;b\n" * 9, encoding="utf-8")
        with self.assertRaises(DataError) as caught:
            prompts.read(path)
        self.assertEqual(str(caught.exception).count("no prompt or question among the columns Thema, Quelle"), 1)
        path = path.with_name("mixed.jsonl")
        path.write_text('{"a": 1}\n{"prompt": ""}\n{"b": 1}\n{"a": 2}\n', encoding="utf-8")
        with self.assertRaises(DataError) as caught:
            prompts.read(path)
        self.assertEqual(len(caught.exception.problems), 3, "every kind of fault at once")
        path = path.with_name("fragen.csv")
        path.write_text("Frage;Quelle\n;b\n", encoding="utf-8")
        with self.assertRaises(DataError) as caught:
            prompts.read(path)
        self.assertIn("the prompt is empty", str(caught.exception))

    def test_what_cannot_be_read_is_refused_with_what_can(self) -> None:
        place = temporary_directory()
        for name, content, expected in (
            ("questions.doc", b"x", "or .txt with a prompt in each line"),
            ("questions", b"x", ".jsonl"),
            ("questions.txt", b"\xff\xfe\xfa", "save it as UTF-8"),
            ("empty.txt", b"\n", "holds no prompts"),
            ("empty.jsonl", b"", "holds no prompts"),
        ):
            (place / name).write_bytes(content)
            with self.assertRaises(DataError) as caught:
                prompts.read(place / name)
            self.assertIn(expected, str(caught.exception), name)


if __name__ == "__main__":
    unittest.main()
