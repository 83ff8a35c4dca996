"""Contamination: planted copies are found by their kind, what is expected is not flagged, the corpus is streamed."""

from __future__ import annotations

import json
import random
import unittest
from contextlib import nullcontext
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from tests.support import run_program, temporary_directory, write_jsonl
from utils.data import ngram_overlap
from utils.data.contamination import HELD_OUT, NO_CORPUS, SAME, UNKNOWN, Contamination, report
from utils.data.ngram_overlap import NEAR_JACCARD, NearDuplicates, NgramIndex, lookup_width, words_of
from utils.data.prepared import Prepared
from utils.exceptions import ArtefactError

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("nor", "tal", "rim", "sek", "von")]


def text(seed: object, count: int) -> str:
    """Distinct words in an order of their own, so that no two texts share three in a row by chance."""
    return " ".join(random.Random(str(seed)).sample(WORDS, count))


def item(name: str, question: str, *answers: str, document: str = "manual", context: str | None = None) -> dict:
    return {"id": name, "document": document, "question": question, "answers": list(answers), "context": context}


def prepared(tests: list[dict], corpus: list[tuple[str, str]] | None, train: list[dict] | None = None) -> Prepared:
    """A directory of prepared data that holds what contamination reads."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    directory = temporary_directory()
    if corpus is not None:
        rows = [{"id": name, "text": content} for name, content in corpus]
        Dataset.from_list(rows).save_to_disk(str(directory / "corpus"))
    other = [item("other", text("other question", 20), text("other answer", 9))]
    for split, examples in (("train", train or other), ("dev", other), ("test", tests)):
        write_jsonl(directory / f"task_{split}.jsonl", examples)
    return Prepared(directory)


def found(result: Contamination, source: str, kind: str) -> tuple[str, ...]:
    return next(o.ids for o in result.overlaps if (o.source, o.kind) == (source, kind))


def kinds(result: Contamination, name: str) -> set[tuple[str, str]]:
    return {(o.source, o.kind) for o in result.overlaps if name in o.ids}


class Unspaced(unittest.TestCase):
    """Scripts without blanks between words: the same finding as for the English twin."""

    TWINS: ClassVar[dict[str, tuple[str, str, str]]] = {
        "Chinese": (
            "在打开检修盖之前操作人员必须先关闭哪一个部件并等待多少分钟？",
            "必须先关闭进水阀前的总阀并等待三分钟。",
            "电机需要每周检查一次。滤芯",
        ),
        "Japanese": (
            "点検口を開ける前に作業者はどの部品を閉めて何分待つ必要がありますか？",
            "給水弁の前の元栓を閉めて三分待ちます。",
            "毎週モーターを点検します。",
        ),
        "Thai": (
            "ก่อนเปิดฝาครอบผู้ปฏิบัติงานต้องปิดชิ้นส่วนใดและรอกี่นาที",
            "ต้องปิดวาล์วหลักหน้าวาล์วน้ำเข้าแล้วรอสามนาที",
            "ต้องตรวจสอบมอเตอร์ทุกสัปดาห์",
        ),
    }

    def test_a_copy_is_found_and_other_text_of_the_domain_is_not(self) -> None:
        for script, (question, answer, filler) in self.TWINS.items():
            tests = [item("copied", question, answer), item("clean", question[::-1], answer[::-1])]
            result = report(prepared(tests, [("a", filler * 9), ("b", f"{filler}{question}{answer}{filler}")]))
            self.assertEqual((result.flagged, result.too_short), (("copied",), 0), script)
            self.assertEqual(found(result, "corpus", "question and answer"), ("copied",), script)

    def test_nothing_is_said_of_what_was_not_looked_up(self) -> None:
        result = report(prepared([item("short", "谁？", "班长。")], [("a", "电机需要每周检查一次。" * 3)]))
        self.assertEqual((result.too_short, result.flagged), (1, ()))
        self.assertIn("0 of 1 test items could be looked up", result.lines()[0])
        self.assertNotIn("flagged", result.lines()[0])


class Corpus(unittest.TestCase):
    QUESTION, ANSWER = text("q", 16), text("a", 14)

    def look(self, *documents: tuple[str, str], tests: list[dict] | None = None, **fields: Any) -> Contamination:
        tests = tests or [item("t", self.QUESTION, self.ANSWER, **fields), item("clean", text(1, 16), text(2, 14))]
        return report(prepared(tests, [("filler", text("filler", 100)), *documents]))

    def test_thirteen_words_of_a_question_are_a_hit_and_twelve_are_none(self) -> None:
        words = self.QUESTION.split()
        for count, expected in ((13, ("t",)), (12, ())):
            document = f"{text(3, 30)} {' '.join(words[2 : 2 + count])} {text(4, 30)}"
            self.assertEqual(found(self.look(("manual", document)), "corpus", "question"), expected, count)

    def test_question_with_its_answer_nearby_is_a_pair_and_far_from_it_a_question(self) -> None:
        for gap, kind in ((20, "question and answer"), (110, "question")):
            between = " ".join(text((gap, i), 55) for i in range(gap // 55 + 1)).split()[:gap]
            document = f"{self.QUESTION} {' '.join(between)} {self.ANSWER}"
            result = self.look(("manual", document))
            self.assertEqual(kinds(result, "t"), {("corpus", kind), ("corpus", "answer")}, gap)
            self.assertEqual(result.flagged, ("t",))

    def test_case_punctuation_and_articles_do_not_hide_a_copy(self) -> None:
        words = self.QUESTION.upper().split()
        document = "The " + " the ".join(f"{word}," for word in words) + "?"
        self.assertEqual(found(self.look(("manual", document)), "corpus", "question"), ("t",))

    def test_answers_alone_are_expected_in_same_documents_and_flagged_in_held_out_ones(self) -> None:
        for name, setting, flagged in (("manual", SAME, ()), ("elsewhere", HELD_OUT, ("t",))):
            result = self.look((name, f"{text(5, 40)} {self.ANSWER}"))
            self.assertEqual((result.setting, result.flagged), (setting, flagged))
            self.assertEqual(kinds(result, "t"), {("corpus", "answer")})

    def test_short_texts_are_looked_up_whole_and_tiny_ones_only_as_a_pair(self) -> None:
        eight, seven = text("eight", 8), text("seven", 7)
        tests = [
            item("eight", eight, "yes"),
            item("seven", seven, "yes"),
            item("five", text("five", 5), text("three", 3)),
            item("tiny", text("tiny", 4), "yes"),
        ]
        every = " . ".join(f"{t['question']} {t['answers'][0]}" for t in tests)
        result = self.look(("manual", every), tests=tests)
        self.assertEqual(found(result, "corpus", "question and answer"), ("eight", "seven", "five"))
        self.assertEqual(result.too_short, 1, "four words and 'yes' say nothing")
        alone = " . ".join(t["question"] for t in tests)
        result = self.look(("manual", alone), tests=tests)
        self.assertEqual(found(result, "corpus", "question"), ("eight",))
        self.assertEqual(found(result, "corpus", "question and answer"), ())
        part = self.look(("manual", f"{text(6, 50)} {' '.join(eight.split()[:7])}"), tests=tests)
        self.assertEqual(part.flagged, ())

    def test_context_counts_from_half_of_its_thirteen_grams_over_all_documents(self) -> None:
        context = text("context", 32)  # 20 n-grams
        words = context.split()
        for cuts, expected in (([(0, 22)], True), ([(0, 21)], False), ([(0, 17), (15, 32)], True)):
            documents = [(f"d{i}", f"{text(('d', i), 20)} {' '.join(words[a:b])}") for i, (a, b) in enumerate(cuts)]
            result = self.look(*documents, context=context)
            self.assertEqual("t" in found(result, "corpus", "context"), expected, cuts)
            self.assertEqual(result.flagged, ("t",) if expected else ())

    def test_a_document_that_is_the_pair_is_a_duplicate_and_a_hardly_changed_one_a_near_duplicate(self) -> None:
        changed = self.ANSWER.replace(self.ANSWER.split()[6], "changed")
        for answer, kind in ((self.ANSWER, "duplicate"), (changed, "near duplicate")):
            result = self.look(("faq", f"{self.QUESTION}? {answer}."))
            self.assertEqual(found(result, "corpus", kind), ("t",))
            self.assertNotEqual(kind, "duplicate" if found(result, "corpus", "near duplicate") else "near duplicate")
            self.assertIn("t", result.flagged)

    def test_setting_is_declared_by_the_documents_names(self) -> None:
        tests = [item(f"t{i}", text(i, 16), "x", document=d) for i, d in enumerate(("json", "guide", "b", "gone"))]
        result = self.look(("json.dumps", "x"), ("folder/guide.pdf", "x"), ("b#3", "x"), tests=tests)
        self.assertEqual((result.setting, result.documents_in_corpus), (SAME, 0.75))
        result = self.look(("jsonlines", "x"), tests=tests)
        self.assertEqual((result.setting, result.documents_in_corpus), (HELD_OUT, 0.0))
        unnamed = [item(f"t{i}", text(i, 16), text(i, 9), document=f"t{i}") for i in range(3)]
        result = self.look(("d", text(1, 9)), tests=unnamed)
        self.assertEqual((result.setting, result.flagged), (UNKNOWN, ("t1",)))

    def test_without_a_corpus_only_pairs_are_compared_and_without_pairs_there_is_an_error(self) -> None:
        result = report(prepared([item("t", self.QUESTION, self.ANSWER)], None))
        self.assertEqual((result.setting, {o.source for o in result.overlaps}), (NO_CORPUS, {"train", "dev"}))
        with self.assertRaises(ArtefactError):
            report(Prepared(temporary_directory()))

    def test_report_is_plain_json_with_shares_examples_and_reasons(self) -> None:
        result = self.look(("manual", f"{self.QUESTION} {self.ANSWER}"))
        plain = json.loads(json.dumps(result.to_json()))
        pair = next(o for o in plain["overlaps"] if o["kind"] == "question and answer" and o["items"])
        self.assertEqual((pair["share"], pair["examples"], pair["is_flagged"]), (0.5, [["t", "manual"]], True))
        self.assertTrue(all(o["why"] for o in plain["overlaps"]))
        self.assertEqual((plain["flagged"], plain["corpus_documents"], plain["test_items"]), (["t"], 2, 2))
        self.assertIn("flagged as contaminated 1 of 2", result.lines()[0])


class Pairs(unittest.TestCase):
    def test_training_pairs_that_give_an_item_away_are_flagged_and_shared_templates_are_not(self) -> None:
        question, answer, context = text("q", 15), text("a", 10), text("c", 60)
        tests = [
            item("copy", question, "another", answer),
            item("near", text("n", 15), text("na", 10)),
            item("template", question, answer, context=context),
            item("passage", text("p", 20), text("pa", 9), context=text("pc", 60)),
            item("answer", text("x", 15), text("shared", 9)),
        ]
        train = [
            item("t1", f"{question}?", answer.upper()),
            item("t2", text("n", 15), text("na", 10) + " more"),
            item("t3", question, text("b", 10), context=text("other context", 60)),
            item("t4", text("r", 10), text("ra", 4), context=text("pc", 60)),
            item("t5", text("y", 15), text("shared", 9)),
        ]
        result = report(prepared(tests, None, train))
        self.assertEqual(found(result, "train", "duplicate"), ("copy",))
        self.assertEqual(found(result, "train", "near duplicate"), ("near",))
        self.assertEqual(found(result, "train", "context"), ("passage",))
        self.assertEqual(kinds(result, "template") & {("train", k) for k in ("question", "question and answer")}, set())
        self.assertIn(("train", "answer"), kinds(result, "answer"))
        self.assertEqual(result.flagged, ("copy", "near", "passage"))


class Overlap(unittest.TestCase):
    def test_index_finds_exactly_what_a_search_of_every_position_finds(self) -> None:
        generator = random.Random(0)
        texts = [[generator.choice("abcd") for _ in range(generator.randint(1, 9))] for _ in range(60)]
        widths = [generator.choice((0, min(3, len(t)), len(t))) for t in texts]
        document = [generator.choice("abcd") for _ in range(400)]
        expected = {
            (number, start, at)
            for number, (words, width) in enumerate(zip(texts, widths, strict=True))
            if width
            for start in range(len(words) - width + 1)
            for at in range(len(document) - width + 1)
            if document[at : at + width] == words[start : start + width]
        }
        self.assertGreater(len(expected), 100)
        colliding = mock.patch.object(ngram_overlap, "_hashed", lambda words: np.zeros(len(words), dtype=np.uint64))
        for hashing in (nullcontext(), colliding):
            with hashing:
                hits = [(hit.text, hit.start, hit.at) for hit in NgramIndex(texts, widths).find(document)]
            self.assertEqual((len(hits), set(hits)), (len(expected), expected))

    def test_near_duplicates_are_those_whose_jaccard_index_reaches_the_threshold(self) -> None:
        def shingles(words: list[str]) -> set[str]:
            joined = " ".join(words)
            return {joined[i : i + 5] for i in range(len(joined) - 4)}

        texts = [text(i, 24).split() for i in range(40)]
        expected, answers = {}, {}
        index = NearDuplicates(texts)
        for number, words in enumerate(texts):
            changed = [*words[: 24 - number % 8], *text(("new", number), 24).split()[: number % 8]]
            a, b = shingles(words), shingles(changed)
            expected[number] = len(a & b) / len(a | b)
            answers[number] = dict(index.find(changed)).get(number)
        self.assertGreater(sum(j >= NEAR_JACCARD for j in expected.values()), 10)
        self.assertGreater(sum(j < NEAR_JACCARD for j in expected.values()), 10)
        for number, jaccard in expected.items():
            self.assertEqual(answers[number] is not None, jaccard >= NEAR_JACCARD, jaccard)
            if answers[number] is not None:
                self.assertAlmostEqual(answers[number], jaccard, places=6)

    def test_widths_follow_the_study(self) -> None:
        self.assertEqual([lookup_width(["w"] * n) for n in (0, 7, 8, 12, 13, 90)], [0, 0, 8, 12, 13, 13])
        self.assertEqual(words_of("The  cat, an Ant; sat"), ["cat", "ant", "sat"])

    def test_result_does_not_depend_on_pythons_hash_seed(self) -> None:
        runs = [run_program("ngram_hits", env={"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")]
        self.assertEqual(runs[0], runs[1])
        self.assertGreater(len(runs[0]), 1000)


class Memory(unittest.TestCase):
    def test_documents_are_read_in_batches_and_none_is_kept(self) -> None:
        place = prepared([item("t", text("q", 16), text("a", 9))], [(f"d{i}", text(i, 60)) for i in range(350)])
        sizes: list[int] = []

        class Watched(Prepared):
            def documents(self, which: str) -> Any:
                return _Watched(super().documents(which), sizes)

        self.assertEqual(report(Watched(place.directory)).corpus_documents, 350)
        self.assertEqual(sizes, [100, 100, 100, 50])


class _Watched:
    """A corpus that can only be streamed."""

    def __init__(self, dataset: Any, sizes: list[int]):
        self.dataset, self.sizes = dataset, sizes

    def __len__(self) -> int:
        return len(self.dataset)

    def select_columns(self, names: list[str]) -> _Watched:
        return _Watched(self.dataset.select_columns(names), self.sizes)

    def iter(self, batch_size: int) -> Any:
        for batch in self.dataset.iter(batch_size=batch_size):
            self.sizes.append(len(batch["id"]))
            yield batch


class Real(unittest.TestCase):
    """The demo's own data, where the corpus holds the documents of the test questions by design."""

    def test_demo_is_same_documents_and_its_answers_are_not_flagged(self) -> None:
        from utils.data.domains.python_demo import python_demo

        demo = python_demo(0)
        place = prepared(demo.examples["test"], [(d["id"], d["text"]) for d in demo.documents], demo.examples["train"])
        result = report(place)
        self.assertEqual((result.setting, result.documents_in_corpus), (SAME, 1.0))
        self.assertGreater(len(found(result, "corpus", "answer")), 0.2 * result.test_items)
        self.assertLess(len(result.flagged), 0.1 * result.test_items)
        self.assertEqual(found(result, "train", "duplicate"), ())


if __name__ == "__main__":
    unittest.main()
