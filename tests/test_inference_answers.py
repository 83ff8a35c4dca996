"""Many answers: short prompts are answered many at once, long ones few, and each gets its own answer."""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from typing import Any
from unittest import mock

from config import InferenceSection
from utils.inference import generation
from utils.inference.generation import GeneratedAnswer
from utils.models.rows import row_support
from utils.models.rows.row_support import RowSupport
from utils.planning.ways import ANSWERING_TOKENS, LEAST_ANSWERS, MOST_ANSWERS, answers_at_once


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

    def test_short_prompts_are_answered_32_at_once_and_long_ones_eight(self) -> None:
        self.assertEqual(self.sizes([50, 20] * 20), [32, 8])
        self.assertEqual(self.sizes([2000] * 20), [8, 8, 4])
        self.assertEqual(sum(self.sizes([2000, 50] * 20)), 40)
        self.assertEqual(self.sizes([50] * 3, RowSupport(pads_left=False)), [1, 1, 1])

    def test_no_batch_has_more_tokens_than_planned_unless_it_is_as_small_as_can_be(self) -> None:
        for tokens in (1, 64, 128, 200, 512, 513, 100_000):
            count = answers_at_once(tokens)
            self.assertTrue(LEAST_ANSWERS <= count <= MOST_ANSWERS)
            self.assertTrue(count * tokens <= ANSWERING_TOKENS or count == LEAST_ANSWERS, tokens)


if __name__ == "__main__":
    unittest.main()
