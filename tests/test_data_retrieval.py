"""Passages: found by rare tokens in any script, cut without loss, kept from the question that stands in them."""

from __future__ import annotations

import functools
import unittest

from datasets import Dataset

from tests.support import temporary_directory, write_jsonl
from utils.data.prepared import Prepared
from utils.data.retrieval import passages, retrieved_prompts, withheld_passages
from utils.data.retrieval.passages import Passage, PassageIndex
from utils.exceptions import ArtefactError, DataError
from utils.models import chat
from utils.models.architectures import toy

TOWNS = {
    "en": "Brenwick lies on the river Osk. Its lighthouse keeper is called Tamsin Veld and keeps bees.",
    "de": "Die Stadt Kaltenau hat einen Hafen, und der Bürgermeister heißt Emil Straß.",
    "zh": "林溪镇的灯塔看守人叫做陈慧敏，她养蜜蜂。",
    "ru": "В городе Верхнеречинск смотритель маяка зовётся Анна Липова.",
}
QUESTIONS = {
    "en": "Who keeps the lighthouse of Brenwick?",
    "de": "Wie heißt der Bürgermeister von Kaltenau?",
    "zh": "林溪镇的灯塔看守人是谁？",
    "ru": "Кто смотритель маяка в городе Верхнеречинск?",
}


@functools.cache
def tokenizer() -> object:
    return toy.tiny_tokenizer()


def corpus(texts: dict[str, str]) -> Dataset:
    ids = chat.document_ids(tokenizer(), list(texts.values()))
    return Dataset.from_list(
        [{"id": n, "text": t, "input_ids": i} for (n, t), i in zip(texts.items(), ids, strict=True)]
    )


def example(question: str, answer: str = "Tamsin Veld", **more: object) -> dict[str, object]:
    return {"id": "q", "document": "q", "question": question, "answers": [answer], **more}


class Finding(unittest.TestCase):
    def test_the_passage_about_a_question_comes_first_in_every_script(self) -> None:
        found = passages.cut(corpus(TOWNS), tokenizer(), 400)
        index = PassageIndex(found)
        for language, question in QUESTIONS.items():
            first = index.find(passages.question_ids(example(question), tokenizer()), 2)[0]
            self.assertEqual(found[first].document, language)

    def test_passages_are_cut_by_tokens_and_lose_none(self) -> None:
        found = passages.cut(corpus(TOWNS), tokenizer(), 16)
        for name, text in TOWNS.items():
            own = [passage for passage in found if passage.document == name]
            self.assertTrue(all(len(passage.ids) == 16 for passage in own[:-1]))
            self.assertEqual(tokenizer().decode([i for passage in own for i in passage.ids]), text)
            self.assertNotIn("\ufffd", "".join(passage.text for passage in own))

    def test_a_question_without_a_known_token_finds_nothing_and_equal_passages_keep_their_order(self) -> None:
        index = PassageIndex([Passage("a", "x", (1, 2)), Passage("b", "y", (1, 2)), Passage("c", "z", (3, 4))])
        self.assertEqual(index.find([9, 10], 3), [])
        self.assertEqual(index.find([2], 3), [0, 1])
        self.assertEqual(index.find([2], 3, frozenset({0})), [1])
        # tokens are not numbered from 0 in a vocabulary of their own: 4 is another token than the fourth
        self.assertEqual(index.find([4], 1), [2])


class OwnText(unittest.TestCase):
    LONG = "Which of the keepers of the lighthouse of Brenwick has kept bees since the spring of that year"

    def held(self, question: str, *texts: str, answer: str = "Tamsin Veld", document: str = "d") -> set[int]:
        made = [Passage(document if document else str(at), text, ()) for at, text in enumerate(texts)]
        return set(withheld_passages.holding_the_question([example(question, answer)], made)[0])

    def test_a_passage_that_holds_the_question_is_kept_from_it_and_one_with_the_answer_alone_is_not(self) -> None:
        self.assertEqual(self.held(self.LONG, f"Exercise 3. {self.LONG}?", TOWNS["en"]), {0})

    def test_a_question_that_two_passages_share_is_found_across_their_border(self) -> None:
        half = len(self.LONG) // 2
        parts = (f"Exercise. {self.LONG[:half]}", f"{self.LONG[half:]}? And so on.", "Something else.")
        self.assertEqual(self.held(self.LONG, *parts), {0, 1})
        self.assertEqual(self.held(self.LONG, *parts, document=""), set())  # two documents do not read on

    def test_a_short_question_counts_with_its_answer_beside_it(self) -> None:
        short, answer = "Who keeps bees in Brenwick?", "it is the keeper Tamsin Veld"
        self.assertEqual(self.held(short, f"{short} {answer}.", f"{short} Nobody knows.", answer=answer), {0})


class Prompts(unittest.TestCase):
    def test_passages_stand_before_the_own_context_and_as_many_as_fit(self) -> None:
        texts = ["first passage " * 6, "second passage " * 6, "third passage " * 6]
        row = example("Who?", context="The question's own context.")
        sizes = []
        for room in (40, 150, 5000):
            longer, used = retrieved_prompts.with_passages(row, texts, tokenizer(), "Answer.", room)
            sizes.append(used)
            self.assertTrue(longer["context"].endswith("The question's own context."))
            if used:
                self.assertTrue(longer["context"].startswith("first passage"))
                self.assertLessEqual(len(chat.prompt_ids(tokenizer(), longer, "Answer.")), room)
        self.assertEqual((sizes[0], sizes[-1]), (0, 3))
        self.assertTrue(0 < sizes[1] < 3, sizes)
        self.assertEqual(row["context"], "The question's own context.")

    def test_passages_of_others_are_read_and_every_problem_is_named_at_once(self) -> None:
        root = temporary_directory()
        good = write_jsonl(root / "good.jsonl", [{"id": "a", "passages": ["x", " "]}, {"id": 2, "passages": []}])
        self.assertEqual(retrieved_prompts.read_passages(good, ["a", "2"]), {"a": ["x"], "2": []})
        with self.assertRaises(DataError) as caught:
            retrieved_prompts.read_passages(good, ["a", "b"])
        self.assertIn("1 of 2 test questions have no line", str(caught.exception))
        bad = root / "bad.jsonl"
        lines = ['{"id": "a"}', "[1]", '{"id": "b", "passages": "text"}', *2 * ['{"id": "c", "passages": []}']]
        bad.write_text("\n".join(lines))
        with self.assertRaises(DataError) as caught:
            retrieved_prompts.read_passages(bad, [])
        for part in (
            "bad.jsonl:1",
            "bad.jsonl:2",
            "bad.jsonl:3: passages is no list",
            "bad.jsonl:5: this question was",
        ):
            self.assertIn(part, str(caught.exception))

    def test_what_cannot_be_retrieved_from_is_refused_before_anything_is_trained(self) -> None:
        root = temporary_directory()
        write_jsonl(root / "task_test.jsonl", [example("Who?")])
        for wanted, error in (("bm25", ArtefactError), (str(root / "none.jsonl"), DataError)):
            with self.assertRaises(error):
                retrieved_prompts.check(wanted, Prepared(root))


if __name__ == "__main__":
    unittest.main()
