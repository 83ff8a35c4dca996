"""Kinds of task: recognised from the pairs, and scored as the field does, in every script."""

from __future__ import annotations

import json
import random
import unittest
from collections.abc import Sequence
from typing import Any

import numpy as np

from config import EvaluateSection
from tests.support import temporary_directory, write_jsonl
from utils.data.prepared import Prepared
from utils.evaluation.metrics import classification, json_answers, primary, task_kinds, text_overlap, text_scores
from utils.evaluation.metrics.task_kinds import TaskKind
from utils.evaluation.report import interval_groups
from utils.evaluation.report.evaluation_report import LIKELIHOODS, OF_KINDS
from utils.exceptions import ConfigError


def prepared(answers: Sequence[str], *, dev: Sequence[str] | None = None, **more: Any) -> Prepared:
    root = temporary_directory()
    for split, texts in (("train", answers), ("dev", answers[:8] if dev is None else dev), ("test", answers[:8])):
        rows = [
            {"id": f"{split}{i}", "document": f"d{i}", "question": f"q{i}", "answers": [t], **more}
            for i, t in enumerate(texts)
        ]
        write_jsonl(root / f"task_{split}.jsonl", rows)
    return Prepared(root)


INVOICES = [json.dumps({"total": i, "currency": "EUR", "lines": [{"item": f"part {i}"}]}) for i in range(12)]
LONG = ["The keeper walked down to the harbour and looked at every boat, " * 4 + str(i) for i in range(12)]


class Recognition(unittest.TestCase):
    def kind(self, *arguments: Any, **more: Any) -> TaskKind:
        return task_kinds.recognised(prepared(*arguments, **more))

    def test_each_kind_is_known_by_its_pairs(self) -> None:
        self.assertEqual(self.kind(["refund", "delivery", "other"] * 10).labels, ("delivery", "other", "refund"))
        self.assertEqual(self.kind(["正面", "负面"] * 15).labels, ("正面", "负面"))
        self.assertEqual(self.kind(INVOICES).name, "extraction")
        self.assertEqual(self.kind(LONG).name, "long answer")
        self.assertEqual(self.kind(["这位看守人走到港口，" * 8 + str(i) for i in range(12)]).name, "long answer")
        self.assertEqual(self.kind([f"it returns {i}" for i in range(40)]).name, "short answer")
        own = [["a", "b"], ["c", "d"]]
        mixed = prepared(["a"])
        rows = [{"id": str(i), "question": "q", "answers": [c[0]], "choices": c} for i, c in enumerate(own * 15)]
        write_jsonl(mixed.directory / "task_train.jsonl", rows)
        write_jsonl(mixed.directory / "task_dev.jsonl", rows[:4])
        self.assertEqual(task_kinds.recognised(mixed).name, "choice")
        self.assertEqual(self.kind(["yes", "no"] * 15, choices=["yes", "no"]).labels, ("no", "yes"))

    def test_what_only_looks_like_labels_is_none(self) -> None:
        self.assertEqual(self.kind(["refund", "delivery"] * 4).name, "short answer")  # too few pairs to say
        self.assertEqual(self.kind([f"street {i % 9}" for i in range(30)]).name, "short answer")  # three pairs each
        self.assertEqual(self.kind(["refund", "delivery"] * 15, dev=["something new"] * 8).name, "short answer")
        self.assertEqual(self.kind(["3", "7", "12"] * 3 + ['{"a": 1}'] * 2).name, "short answer")

    def test_conversations_are_said_and_change_nothing_else(self) -> None:
        history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
        found = self.kind([f"it returns {i}" for i in range(40)], history=history)
        self.assertEqual((found.name, found.multi_turn), ("short answer", True))
        self.assertIn("the last turn", found.sentence)

    def test_only_what_is_measured_more_than_before_is_another_evaluation(self) -> None:
        self.assertEqual(TaskKind("short answer", multi_turn=True).deciding(), {})
        self.assertEqual(TaskKind("choice").deciding(), {})
        self.assertNotEqual(
            TaskKind("classification", ("a", "b")).deciding(), TaskKind("classification", ("a",)).deciding()
        )

    def test_answers_longer_than_what_is_generated_are_said_before(self) -> None:
        self.assertIn("300 is enough", task_kinds.too_long(TaskKind("long answer"), [20, 300], 48))
        self.assertEqual(task_kinds.too_long(TaskKind("long answer"), [20, 30], 48), "")
        self.assertEqual(task_kinds.too_long(TaskKind("short answer"), [300], 48), "")


class LongAnswers(unittest.TestCase):
    def test_identical_texts_are_1_in_every_script_and_different_ones_are_not(self) -> None:
        texts = [
            "the keeper keeps bees",
            "林溪镇的灯塔看守人养蜜蜂。",
            "Смотритель маяка держит пчёл.",
            "يحتفظ الحارس بالنحل",
        ]
        for score in (text_overlap.chrf, text_overlap.rouge_l):
            for text in texts:
                self.assertAlmostEqual(score(text, ["something else entirely", text]), 1.0, msg=text)
                self.assertLess(score(text, [t for t in texts if t != text]), 0.35, text)
            self.assertEqual(score("", ["x"]), 0.0)

    def test_rouge_l_is_the_longest_common_subsequence(self) -> None:
        # Lin 2004: "police kill the gunman" against "police killed the gunman" shares three of four words in order
        self.assertAlmostEqual(text_overlap.rouge_l("police kill the gunman", ["police killed the gunman"]), 0.75)
        self.assertAlmostEqual(text_overlap.rouge_l("the gunman kill police", ["police killed the gunman"]), 0.5)
        generator = random.Random(0)
        for _ in range(200):
            first, second = ([generator.choice("abcd") for _ in range(generator.randint(0, 90))] for _ in range(2))
            self.assertEqual(text_overlap.longest_common_subsequence(first, second), by_table(first, second))

    def test_chrf_is_sacrebleus_own(self) -> None:
        from sacrebleu.metrics import CHRF

        expected = CHRF().sentence_score("the keeper walks", ["the keeper walked home"]).score / 100
        self.assertAlmostEqual(text_overlap.chrf("the keeper walks", ["the keeper walked home"]), expected)


def by_table(first: Sequence[str], second: Sequence[str]) -> int:
    lengths = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            lengths[i + 1, j + 1] = lengths[i, j] + 1 if a == b else max(lengths[i, j + 1], lengths[i + 1, j])
    return int(lengths[-1, -1])


class Extraction(unittest.TestCase):
    GOLD = '{"total": 3, "currency": "EUR", "lines": [{"item": "part 3"}, {"item": "part 4"}]}'

    def test_fields_are_paths_with_values_whatever_their_order(self) -> None:
        for text, expected in (
            ('{"lines": [{"item": "Part 4."}, {"item": "part 3"}], "currency": "eur", "total": 3}', 1.0),
            ('{"total": 3, "currency": "USD", "lines": [{"item": "part 3"}]}', 2 * 2 / (3 + 4)),
            ('{"total": "three"}', 0.0),
            ("3 EUR", 0.0),
            ("", 0.0),
        ):
            self.assertAlmostEqual(json_answers.field_f1(text, [self.GOLD]), expected, msg=text)
        self.assertEqual(json_answers.field_f1('{"a": true}', ['{"a": 1}']), 0.0)

    def test_schema_follows_from_the_answers_and_is_loosened_by_dev(self) -> None:
        schema = json_answers.schema_of(INVOICES, INVOICES[:2])
        self.assertTrue(json_answers.is_valid(INVOICES[0], schema))
        for wrong in ('{"total": "3", "currency": "EUR", "lines": []}', '{"total": 3}', '{"note": 1}', "no", "[1]"):
            self.assertFalse(json_answers.is_valid(wrong, schema), wrong)
        self.assertFalse(json_answers.is_valid(INVOICES[0][:-1] + ', "note": "x"}', schema))
        looser = json_answers.schema_of(INVOICES, ['{"total": 3}'])
        self.assertTrue(json_answers.is_valid('{"total": 3}', looser))
        self.assertFalse(json_answers.is_valid('{"total": "3"}', looser))

    def test_ones_own_schema_is_used_and_checked(self) -> None:
        path = temporary_directory() / "schema.json"
        path.write_text('{"type": "object", "required": ["total"]}')
        found = task_kinds.recognised(prepared(["no json"] * 30), json_answers.read_schema(path))
        self.assertEqual((found.name, found.schema["required"]), ("extraction", ["total"]))
        for text in ('{"type": "no such type"}', "[1, 2]", "{"):
            path.write_text(text)
            with self.assertRaises(ConfigError, msg=text):
                json_answers.read_schema(path)

    def test_metrics_of_a_kind_read_the_answers(self) -> None:
        kind = TaskKind("extraction", schema=json_answers.schema_of(INVOICES))
        examples = [{"id": "a", "answers": [INVOICES[3]]}]
        valid, fields = (metric.on(examples) for metric in task_kinds.metrics(kind))
        self.assertEqual(valid.value({"name": "a", "text": INVOICES[4]}), 1.0)
        self.assertAlmostEqual(fields.value({"name": "a", "text": INVOICES[4]}), 1 / 3)
        self.assertEqual(valid.value({"name": "a", "text": "none"}), 0.0)


class Classification(unittest.TestCase):
    LABELS = ("delivery", "other", "refund")

    def item(self, document: int, right: int, likeliest: int) -> dict[str, Any]:
        nlls = [5.0 - 4.0 * (at == likeliest) for at in range(3)]
        scored = {"answer_nll": 1.0, "answer_tokens": 1, "end_nll": 0.1, "choice_tokens": [1, 1, 1]}
        return {"name": "x", "document": f"d{document}", "choice_nlls": nlls, "answer_index": right, **scored}

    def test_macro_f1_and_the_matrix_are_those_of_the_definition(self) -> None:
        pairs = [(0, 0)] * 8 + [(0, 1)] * 2 + [(1, 1)] * 3 + [(2, 0)]
        items = [self.item(at % 7, right, likeliest) for at, (right, likeliest) in enumerate(pairs)]
        found = classification.report([{"items": items}], self.LABELS, seed=0)
        self.assertEqual(found["confusion"], [[8, 2, 0], [0, 3, 0], [1, 0, 0]])
        # delivery: 2 * 8 / (10 + 9); other: 2 * 3 / (3 + 5); refund: 0
        self.assertAlmostEqual(found["macro_f1"], (16 / 19 + 6 / 8 + 0) / 3)
        low, high = found["interval"]
        self.assertTrue(low < found["macro_f1"] < high)
        few = classification.report([{"items": items[:3]}], self.LABELS, seed=0)
        self.assertIsNone(few["interval"])

    def test_labels_become_the_choices_and_an_answer_that_is_none_has_no_right_one(self) -> None:
        rows = [{"id": "a", "answers": ["refund"]}, {"id": "b", "answers": ["something"]}]
        found = classification.with_labels(rows, self.LABELS)
        self.assertEqual([row["answer_index"] for row in found], [2, None])
        self.assertEqual(found[0]["choices"], list(self.LABELS))

    def test_labels_let_accuracy_decide(self) -> None:
        source = prepared(["refund", "delivery"] * 15)
        settings = EvaluateSection(primary="choice_accuracy")
        self.assertEqual(primary.chosen(settings, source, has_labels=True).name, "choice_accuracy")
        with self.assertRaises(ConfigError):
            primary.chosen(settings, source)
        with self.assertRaises(ConfigError):
            primary.chosen(EvaluateSection(primary="field_f1"), source)

    def test_every_metric_that_may_decide_is_known(self) -> None:
        from config import ANSWER_METRICS, LIKELIHOOD_METRICS

        self.assertEqual(set(primary.BUILT_IN), set(ANSWER_METRICS))
        self.assertEqual({m.name for m in primary.BUILT_IN.values() if not m.generates}, set(LIKELIHOOD_METRICS))
        self.assertEqual(set(text_scores.TEXT_SCORES), set(ANSWER_METRICS) - set(LIKELIHOOD_METRICS))

    def test_report_draws_every_row_and_the_matrix(self) -> None:
        cell = {"meaning": "m", "choice_accuracy": 0.6, "intervals": {"choice_accuracy": [0.5, 0.7]}}
        found = {"macro_f1": 0.5, "interval": [0.4, 0.6], "confusion": [[3, 1], [0, 2]]}
        results = {
            "cells": {"task": cell, "composed": cell},
            "task": TaskKind("classification", ("a", "b")).to_json() | {"cells": {"task": found, "composed": found}},
        }
        drawn = interval_groups.task(results, (*LIKELIHOODS, *OF_KINDS))
        self.assertEqual([group["title"] for group in drawn["groups"]], ["choice accuracy", "macro F1"])
        self.assertEqual([row["name"] for row in drawn["groups"][1]["rows"]], ["task", "composed"])
        self.assertEqual([name for name, _ in drawn["matrices"]], ["task", "composed"])
        self.assertEqual(drawn["matrices"][0][1][0][0], {"count": 3, "share": 0.75})


if __name__ == "__main__":
    unittest.main()
