"""Labelled examples: every accepted shape becomes the common form, every error names file and line."""

from __future__ import annotations

import csv
import json
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from tests.test_data_documents import hub_dataset
from utils.data.examples import read_task_examples
from utils.data.splits import leaks, split_by_document
from utils.exceptions import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FIELDS = [
    "id",
    "document",
    "system",
    "history",
    "question",
    "context",
    "reasoning",
    "answers",
    "choices",
    "answer_index",
]


class TaskTest(unittest.TestCase):
    """A temporary folder, and short ways to write rows into it, read them, and read what was wrong."""

    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def write(self, name: str, content: str) -> str:
        (self.folder / name).write_text(content, encoding="utf-8")
        return str(self.folder / name)

    def rows(self, *rows: object) -> str:
        return self.write("task.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def read(self, source: str, **options):
        return read_task_examples(source, cache_dir=self.folder / "cache", **options)

    def one(self, row: dict) -> dict:
        examples, _ = self.read(self.rows(row))
        self.assertEqual(len(examples), 1)
        return examples[0]

    def error(self, source: str, **options) -> str:
        with self.assertRaises(DataError) as caught:
            self.read(source, **options)
        return str(caught.exception)

    def assert_fields(self, example: dict, **expected: object) -> None:
        self.assertEqual(list(example), FIELDS)
        self.assertEqual({name: example[name] for name in expected}, expected)


class TestShapes(TaskTest):
    def test_question_and_answers(self):
        example = self.one(
            {"id": 3, "doc_id": "d", "Question": " q ", "answers": ["a", "b", "a"], "context": "c", "z": 1}
        )
        self.assert_fields(example, id="3", document="d", question="q", answers=["a", "b"], context="c", history=[])
        self.assert_fields(example, system=None, reasoning=None, choices=None, answer_index=None)

    def test_question_and_one_answer(self):
        self.assert_fields(self.one({"question": "q", "answer": "a"}), answers=["a"])
        self.assert_fields(self.one({"question": "q", "answers": "a"}), answers=["a"])
        self.assert_fields(self.one({"question": "q", "answer": 42}), answers=["42"])

    def test_squad(self):
        row = {"id": "s", "title": "Heat", "context": "c", "question": "q"}
        path = self.rows(
            {**row, "answers": {"text": ["x", "x", "y"], "answer_start": [1, 1, 2]}},
            {**row, "answers": {"text": [], "answer_start": []}},
        )
        examples, report = self.read(path)
        self.assert_fields(examples[0], document="Heat", answers=["x", "y"], context="c")
        self.assertEqual((report.rows, report.examples, report.dropped), (2, 1, {"unanswerable": 1}))
        self.assertEqual(report.shape, "squad")

    def test_prompt_and_completion_as_text(self):
        self.assert_fields(self.one({"prompt": "q", "completion": " a"}), question="q", answers=["a"])

    def test_prompt_and_completion_as_messages(self):
        prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
        example = self.one({"prompt": prompt, "completion": [{"role": "assistant", "content": "a"}]})
        self.assert_fields(example, system="s", question="q", answers=["a"], history=[])
        self.assert_fields(self.one({"prompt": prompt, "completion": "a"}), system="s", question="q", answers=["a"])

    def test_messages_end_at_the_last_assistant_turn(self):
        turns = [
            ("system", "s"),
            ("user", "q1"),
            ("assistant", "a1"),
            ("user", "q2"),
            ("assistant", "a2"),
            ("user", "q3"),
        ]
        example = self.one({"messages": [{"role": role, "content": content} for role, content in turns]})
        history = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]
        self.assert_fields(example, system="s", history=history, question="q2", answers=["a2"])

    def test_messages_with_parts_and_reasoning(self):
        user = {"role": "user", "content": [{"type": "text", "text": "q"}]}
        example = self.one({"messages": [user, {"role": "assistant", "content": "a", "reasoning_content": "r"}]})
        self.assert_fields(example, question="q", answers=["a"], reasoning="r")

    def test_sharegpt(self):
        turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
        self.assert_fields(self.one({"conversations": turns}), system="s", question="q", answers=["a"])

    def test_alpaca(self):
        example = self.one({"instruction": "do", "input": "with this", "output": "done", "history": [["q0", "a0"]]})
        history = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]
        self.assert_fields(example, question="do", context="with this", answers=["done"], history=history)
        self.assert_fields(self.one({"instruction": "do", "input": "", "output": "done"}), context=None)

    def test_choices_and_index_give_the_answer(self):
        example = self.one({"question": "q", "choices": ["x", "y"], "answer_index": 1})
        self.assert_fields(example, answers=["y"], choices=["x", "y"], answer_index=1)

    def test_choices_and_answer_give_the_index(self):
        self.assert_fields(self.one({"question": "q", "choices": ["x", "Y"], "answer": "y"}), answer_index=1)

    def test_arc_and_mmlu(self):
        arc = {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}
        self.assert_fields(self.one({"question": "q", "choices": arc, "answerKey": "3"}), answers=["z"], answer_index=2)
        self.assert_fields(self.one({"question": "q", "choices": ["x", "y"], "answerKey": "B"}), answers=["y"])
        self.assert_fields(
            self.one({"question": "q", "choices": ["x", "y"], "answer": 0}), answers=["x"], answer_index=0
        )
        self.assert_fields(
            self.one({"question": "q", "choices": ["1", "0"], "answer": 0}), answers=["0"], answer_index=1
        )

    def test_thinking_at_the_start_becomes_reasoning(self):
        example = self.one({"prompt": "q", "completion": "<think>\nwhy\nso</think>\n\nbecause"})
        self.assert_fields(example, reasoning="why\nso", answers=["because"])
        self.assert_fields(self.one({"prompt": "q", "completion": "the tag </think>"}), answers=["the tag </think>"])

    def test_mixed_shapes_and_null_columns_of_parquet(self):
        import pyarrow
        from pyarrow import parquet

        rows = [{"id": "1", "question": "q", "answers": ["a"], "messages": None}]
        turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]
        rows.append({"id": "2", "question": None, "answers": None, "messages": turns})
        parquet.write_table(pyarrow.Table.from_pylist(rows), self.folder / "task.parquet")
        examples, report = self.read(str(self.folder / "task.parquet"))
        self.assertEqual([example["answers"] for example in examples], [["a"], ["v"]])
        self.assertEqual(report.shape, "question + messages")

    def test_csv_cells_that_look_like_json_are_json(self):
        with (self.folder / "task.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "document", "question", "answers", "choices", "answer_index", "context"])
            writer.writerow(["1", "d", "q1", '["a", "b"]', "", "", ""])
            writer.writerow(["2", "d", "q2", "", '["x", "y"]', "1", "c"])
            writer.writerow(["3", "d", "q3", "plain, text", "", "", ""])
            writer.writerow(["4", "d", "q4", '{"text": ["s"], "answer_start": [0]}', "", "", ""])
        examples, _ = self.read(str(self.folder / "task.csv"))
        self.assertEqual([e["answers"] for e in examples], [["a", "b"], ["y"], ["plain, text"], ["s"]])
        self.assertEqual([(e["choices"], e["context"]) for e in examples[:2]], [(None, None), (["x", "y"], "c")])

    def test_tsv_and_json_list(self):
        examples, _ = self.read(self.write("task.tsv", "question\tanswer\nq\t[1] see there\n"))
        self.assertEqual(examples[0]["answers"], ["[1] see there"])
        examples, _ = self.read(self.write("task.json", json.dumps([{"question": "q", "answer": "a"}], indent=1)))
        self.assertEqual(examples[0]["id"], "task.json#1")


class TestCounting(TaskTest):
    def test_exact_duplicates_are_dropped_and_other_contexts_kept(self):
        row = {"question": "q", "answers": ["a"]}
        history = [{"role": "user", "content": "earlier"}, {"role": "assistant", "content": "yes"}]
        examples, report = self.read(self.rows(row, row, {**row, "context": "c"}, {**row, "history": history}))
        self.assertEqual((len(examples), report.dropped), (3, {"duplicate": 1}))

    def test_rows_without_document_stand_for_themselves_and_are_counted(self):
        rows = [{"id": "i", "question": f"q{n}", "answer": "a"} for n in range(2)]
        rows += [{"question": "q", "answer": "a"}, {"question": "r", "answer": "a", "source": "s", "document": " "}]
        examples, report = self.read(self.rows(*rows))
        self.assertEqual([e["id"] for e in examples], ["i", "i~2", "task.jsonl#3", "task.jsonl#4"])
        self.assertEqual([e["document"] for e in examples], ["i", "i", "task.jsonl#3", "s"])
        self.assertEqual(report.rows_without_document, 3)
        self.assertEqual(json.loads(json.dumps(report.to_json()))["shape"], "question")

    def test_reading_twice_gives_the_same(self):
        path = self.rows(*({"question": f"q{n}", "answer": "a", "document": f"d{n % 5}"} for n in range(20)))
        self.assertEqual(self.read(path), self.read(path))


class TestErrors(TaskTest):
    def assert_row_error(self, row: dict, expected: str) -> None:
        """The bad row is the second of the file, so that a wrong line number shows."""
        path = self.rows({"question": "good", "answer": "good"}, row)
        self.assertRegex(self.error(path), rf"task\.jsonl:2: {expected}")

    def test_malformed_line_is_named_with_file_and_line(self):
        path = self.write("task.jsonl", '{"question": "q", "answer": "a"}\n\n{"question": "q", "ans\n')
        self.assertIn(f"{path}:3: not valid JSON", self.error(path))

    def test_no_question(self):
        self.assert_row_error({"question": " ", "answers": ["a"]}, "no question")
        self.assert_row_error({"question": None, "answers": ["a"]}, "no question")
        self.assert_row_error({"answers": ["a"]}, "no question")
        self.assert_row_error({"messages": [{"role": "assistant", "content": "a"}]}, "no question")

    def test_no_answers(self):
        self.assert_row_error({"question": "q", "answers": []}, "no answers")
        self.assert_row_error({"question": "q"}, "no answers")
        self.assert_row_error({"question": "q", "answer": None}, "no answers")
        self.assert_row_error({"messages": [{"role": "user", "content": "q"}]}, "no answer: there is no assistant turn")

    def test_empty_answer(self):
        self.assert_row_error({"question": "q", "answers": ["a", " "]}, "empty answer")
        self.assert_row_error({"question": "q", "answers": ["a", None]}, "empty answer")
        self.assert_row_error({"prompt": "q", "completion": "<think>only thoughts</think>"}, "empty answer")
        self.assertIn("task.csv:2: empty answer", self.error(self.write("task.csv", "question,answer\nq,\n")))

    def test_answer_that_is_not_text(self):
        self.assert_row_error({"question": "q", "answer": True}, "`answer` is a bool")
        self.assert_row_error({"question": "q", "answers": [{"span": [1, 2]}]}, "`answer` is a dict")
        self.assert_row_error({"question": "q", "answer": float("nan")}, "no answers")

    def test_answer_index_out_of_range(self):
        for index in (2, -1, "two", 1.5, True):
            self.assert_row_error(
                {"question": "q", "choices": ["x", "y"], "answer_index": index}, "answer_index out of"
            )
        self.assert_row_error({"question": "q", "answer": "a", "answer_index": 0}, "answer_index without choices")

    def test_index_whose_choice_is_not_among_the_answers(self):
        row = {"question": "q", "answers": ["X"], "choices": [" x", "y"], "answer_index": 0}
        self.assertEqual(self.one(row)["answer_index"], 0)
        self.assert_row_error({**row, "answer_index": 1}, "answer_index 1 is the choice 'y', which is not among")
        self.assert_row_error(
            {"question": "q", "answers": ["z"], "choices": ["x", "y"]}, "none of the answers is among"
        )

    def test_fewer_than_two_choices(self):
        self.assert_row_error({"question": "q", "answer": "x", "choices": ["x"]}, "fewer than 2 choices")
        self.assert_row_error({"question": "q", "answer": "x", "choices": "x"}, "fewer than 2 choices")

    def test_turn_before_the_answer_must_be_the_users(self):
        turns = [{"role": role, "content": role} for role in ("user", "assistant", "assistant")]
        turns[1]["weight"] = 0  # without a mark they are one turn
        self.assert_row_error({"messages": turns}, "no question: the turn before the last answer is not the user's")
        self.assert_row_error({"messages": [{"role": "tool", "content": "t"}]}, "no answer: there is no assistant turn")
        self.assert_row_error({"messages": [{"role": "narrator", "content": "t"}]}, "a turn of unknown role")

    def test_unclosed_thinking(self):
        self.assert_row_error({"prompt": "q", "completion": "<think>never"}, "<think> is never closed")

    def test_unknown_shape_lists_columns_and_shapes_once(self):
        message = self.error(self.rows(*[{"headline": "h", "label": 1}] * 50))
        self.assertRegex(message, r"task\.jsonl:1: unknown shape \(got 'columns headline, label'\)")
        self.assertIn("instruction + input + output", message)
        self.assertNotIn("problems", message)

    def test_long_values_are_cut(self):
        message = self.error(self.rows({"question": "q", "answer": {"x": "y" * 500}}))
        self.assertIn("...", message)
        self.assertLess(len(message), 300)

    def test_csv_cell_that_begins_like_json_but_is_not(self):
        message = self.error(self.write("task.csv", "question,answers\nq,['a'\n"))
        self.assertIn("task.csv:2: the cell in `answers` begins like JSON but is not", message)

    def test_all_problems_come_together(self):
        message = self.error(self.rows({"question": "", "answer": "a"}, {"question": "q", "answers": []}))
        self.assertIn("2 problems", message)

    def test_empty_and_fully_dropped_files_are_errors(self):
        self.assertIn("no examples: 0 rows read", self.error(self.write("task.jsonl", "")))
        self.assertIn("no examples: 0 rows read", self.error(self.write("task.json", "")))
        row = {"question": "q", "answers": {"text": [], "answer_start": []}}
        self.assertIn("dropped: 1 unanswerable", self.error(self.rows(row)))

    def test_source_that_is_no_table(self):
        self.assertIn("does not exist", self.error("no/such/file.jsonl"))
        (self.folder / "questions.csv").touch()
        said = self.error(str(self.folder / "question.csv"))
        self.assertIn(f"does not exist\n      -> did you mean {self.folder / 'questions.csv'}?", said)
        self.assertIn("is a folder", self.error(str(self.folder)))
        self.assertIn("not a table", self.error(self.write("task.txt", "q a")))
        self.assertIn("a file has no splits", self.error(self.rows({"question": "q", "answer": "a"}), split="train"))


class TestHub(TaskTest):
    def test_named_split_of_a_pinned_dataset(self):
        splits = {"train": [], "validation": [{"question": "q", "answer": "a"}]}
        with mock.patch("datasets.load_dataset_builder", return_value=hub_dataset(splits)):
            examples, _ = self.read("org/name", hub_revision=COMMIT, split="validation")
            self.assertEqual(examples[0]["id"], "org/name#1")
            message = self.error("org/name", hub_revision=COMMIT, split="dev")
        self.assertIn("has no split 'dev' (got", message)
        self.assertIn("validation", message)

    def test_unpinned_dataset_is_an_error(self):
        self.assertIn("not pinned to a commit", self.error("org/name"))


class TestRealData(TaskTest):
    def test_shared_task_files_are_read_whole_and_do_not_leak(self):
        for name in ("policyqa", "openstax_anatomy"):
            folder = SHARED_DATA / name
            if not (folder / "train.jsonl").is_file():
                self.skipTest(f"{folder} is not here: the shared test data is not part of the repository")
            with self.subTest(name):
                train, report = self.read(str(folder / "train.jsonl"))
                test, _ = self.read(str(folder / "test.jsonl"))
                self.assertEqual(report.examples + sum(report.dropped.values()), report.rows)
                self.assertEqual(report.rows_without_document, 0)
                self.assertEqual(leaks(train, test), [])
                splits = split_by_document(train, dev_share=0.1, test_share=0.2, seed=0)
                self.assertTrue(all(splits.values()))
                self.assertEqual(sum(map(len, splits.values())), len(train))
                if name == "openstax_anatomy":
                    with_choices = [e for e in train if e["choices"]]
                    self.assertGreater(len(with_choices), 300)
                    self.assertTrue(all(e["choices"][e["answer_index"]] in e["answers"] for e in with_choices))


if __name__ == "__main__":
    unittest.main()
