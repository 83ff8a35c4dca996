"""Labelled pairs as people have them: marks obeyed, shapes known, columns named, dialects read; refusals that help."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import unittest
import zipfile
from typing import Any, ClassVar

import pyarrow

from config import COLUMN_ROLES
from tests.support import temporary_directory
from utils.data.examples import TaskReport, read_task_examples
from utils.data.labelled import column_roles, marks, report
from utils.data.splits import leaks
from utils.exceptions import DataError

USER = {"role": "user", "content": "Why?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": '{"id": "7"}'}}
READ = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": {"id": "7"}}}


def said(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def workbook(*sheets: list[list[Any]]) -> bytes:
    """An xlsx file, written by hand."""
    names = [f"Tabelle{n}" for n in range(1, len(sheets) + 1)]
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    related = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    packed = "http://schemas.openxmlformats.org/package/2006"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"

    def cell(value: Any) -> str:
        if value is None:
            return "<c/>"
        if isinstance(value, int):
            return f"<c><v>{value}</v></c>"
        return f'<c t="inlineStr"><is><t>{value}</t></is></c>'

    listed = "".join(f'<sheet name="{name}" sheetId="{n}" r:id="r{n}"/>' for n, name in enumerate(names, 1))
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{packed}/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
        + "".join(
            f'<Override PartName="/xl/worksheets/sheet{n}.xml" ContentType="{kind}.worksheet+xml"/>'
            for n in range(1, len(sheets) + 1)
        )
        + "</Types>",
        "_rels/.rels": f'<Relationships xmlns="{packed}/relationships"><Relationship Id="r1" '
        f'Type="{related}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{related}"><sheets>{listed}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{packed}/relationships">'
        + "".join(
            f'<Relationship Id="r{n}" Type="{related}/worksheet" Target="worksheets/sheet{n}.xml"/>'
            for n in range(1, len(sheets) + 1)
        )
        + "</Relationships>",
    }
    for n, rows in enumerate(sheets, 1):
        body = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
        parts[f"xl/worksheets/sheet{n}.xml"] = f'<worksheet xmlns="{main}"><sheetData>{body}</sheetData></worksheet>'
    packed_file = io.BytesIO()
    with zipfile.ZipFile(packed_file, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, '<?xml version="1.0" encoding="UTF-8"?>' + text)
    return packed_file.getvalue()


class Pairs(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_directory()

    def file(self, content: str | bytes, name: str) -> str:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def read(self, *rows: dict[str, Any], columns: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], TaskReport]:
        return self.read_file("".join(json.dumps(row) + "\n" for row in rows), "pairs.jsonl", columns=columns)

    def read_file(self, content: str | bytes, name: str, **options: Any) -> tuple[list[dict[str, Any]], TaskReport]:
        examples, found = read_task_examples(self.file(content, name), cache_dir=self.folder / "cache", **options)
        self.assertEqual(found.rows, found.examples + sum(found.dropped.values()), "rows in are rows out")
        return examples, found

    def one(self, row: dict[str, Any], **options: Any) -> dict[str, Any]:
        examples, _ = self.read(row, **options)
        return examples[0]

    def refused(self, *rows: dict[str, Any], columns: tuple[str, ...] = ()) -> str:
        with self.assertRaises(DataError) as caught:
            self.read(*rows, columns=columns)
        return str(caught.exception)


class Marks(Pairs):
    GOOD: ClassVar[dict[str, Any]] = {"messages": [USER, said("Good.")]}

    def test_the_last_turn_that_is_to_be_trained_is_the_answer_however_the_mark_is_spelled(self) -> None:
        for mark in (
            {"weight": 0},
            {"weight": 0.0},
            {"train": False},
            {"loss": False},
            {"trainable": "false"},
            {"loss_scale": 0},
        ):
            turns = [USER, said("Good.", weight=1), {"role": "user", "content": "And?"}, said("Go away.", **mark)]
            example = self.one({"messages": turns})
            self.assertEqual((example["answers"], example["history"]), (["Good."], []), mark)
        masked = self.one({"messages": [USER, said("Good."), USER, said("Go away.", masked=True)]})
        self.assertEqual(masked["answers"], ["Good."])

    def test_an_earlier_turn_that_is_marked_stays_context_and_is_not_trained(self) -> None:
        example = self.one({"messages": [USER, said("Go away.", train=False), USER, said("Good.")]})
        self.assertEqual(example["history"][1], {"role": "assistant", "content": "Go away.", "untrained": True})

    def test_rows_that_are_not_to_be_trained_are_left_out_and_counted(self) -> None:
        pair = {"question": "q", "answer": "Go away."}
        for row, reason in (
            ({"messages": [USER, said("Go away.", weight=0)]}, marks.UNTRAINED),
            ({**self.GOOD, "label": False}, marks.FALSE_LABEL),
            ({**pair, "label": "false"}, marks.FALSE_LABEL),
            ({**pair, "is_correct": False}, marks.FALSE_LABEL),
            ({**pair, "weight": 0}, marks.UNTRAINED),
            ({**pair, "train": False}, marks.UNTRAINED),
        ):
            examples, found = self.read(row, {**self.GOOD, **({"label": True} if "label" in row else {})})
            self.assertEqual([e["answers"] for e in examples], [["Good."]], row)
            self.assertEqual(found.dropped, {reason: 1})

    def test_a_label_of_0_and_1_is_a_mark_and_one_of_other_numbers_a_column_that_is_not_used(self) -> None:
        rows = [{"question": f"q{n}", "answer": f"answer {n}", "label": n % 2} for n in range(6)]
        examples, found = self.read(*rows)
        self.assertEqual([e["answers"][0] for e in examples], ["answer 1", "answer 3", "answer 5"])
        self.assertEqual(found.dropped, {marks.FALSE_LABEL: 3})
        examples, found = self.read(*rows, {"question": "q", "answer": "more", "label": 4})
        self.assertEqual((len(examples), found.columns_not_used), (7, {"label": 7}))

    def test_marks_that_are_neither_yes_nor_no_are_refused(self) -> None:
        self.assertIn("neither 0 nor 1", self.refused({"messages": [USER, said("x", weight=0.5)]}))
        self.assertIn("contradict", self.refused({"messages": [USER, said("x", weight=1, train=False)]}))
        detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
        self.assertIn("train_detail", self.refused({"messages": [USER, said("x", train_detail=detail)]}))
        self.assertIn("ignore=weight", self.refused({"question": "q", "answer": "a", "weight": 0.3}))
        self.assertEqual(
            self.one({"question": "q", "answer": "a", "weight": 0.3}, columns=("ignore=weight",))["id"][:5], "pairs"
        )

    def test_preferences_are_refused_with_the_line_that_trains_the_better_answers(self) -> None:
        row = {"prompt": "q", "chosen": "Good.", "rejected": "Go away."}
        message = self.refused(row, row)
        self.assertIn("preference data (got 'columns prompt, chosen, rejected')", message)
        self.assertIn("--data.columns answer=chosen", message)
        self.assertEqual(message.count("preference data"), 1)
        examples, found = self.read(row, columns=("answer=chosen",))
        self.assertEqual((examples[0]["answers"], found.columns_not_used), (["Good."], {"rejected": 1}))
        turns = {"chosen": [USER, said("Good.")], "rejected": [USER, said("Go away.")]}
        self.assertIn("--data.columns messages=chosen", self.refused(turns))
        self.assertEqual(self.one(turns, columns=("messages=chosen",))["answers"], ["Good."])

    def test_a_conversation_whose_answer_is_one_of_two_is_preference_data(self) -> None:
        asked = [*Conversations.TURNS, {"role": "user", "content": "So?"}]
        row = {"conversations": asked, "chosen": said("Good."), "rejected": said("Go away.")}
        self.assertIn("preference data", self.refused(row))
        self.assertEqual(self.one(row, columns=("answer=chosen",))["answers"], ["Good."])
        examples, found = self.read({"messages": Conversations.TURNS, "rejected_response": "Go away."})
        self.assertEqual((examples[0]["answers"], found.columns_not_used), (["Two."], {"rejected_response": 1}))

    def test_ranked_outputs_are_no_accepted_answers(self) -> None:
        for column in ("output", "response", "completion"):
            message = self.refused({"instruction": "q", column: ["better", "worse"]})
            self.assertIn(f"`{column}` is a list of 2 outputs", message)
        self.assertEqual(self.one({"instruction": "q", "output": ["only"]})["answers"], ["only"])
        self.assertEqual(self.one({"question": "q", "answers": ["one", "other"]})["answers"], ["one", "other"])


class Shapes(Pairs):
    def assert_read(self, row: dict[str, Any], columns: tuple[str, ...] = (), **expected: Any) -> None:
        example = self.one(row, columns=columns)
        self.assertEqual({name: example.get(name) for name in expected}, expected, row)

    def test_question_answer_context_and_system_under_the_names_of_popular_data_sets(self) -> None:
        for question, answer in (
            ("question", "answer"),
            ("prompt", "response"),
            ("instruction", "response"),
            ("query", "response"),
            ("input", "output"),
            ("problem", "solution"),
            ("Question", "Correct Answer"),
            ("user", "assistant"),
            ("Frage", "Antwort"),
            ("question", "final_answer"),
            ("instruction", "output"),
            ("prompt", "completion"),
        ):
            self.assert_read({question: "q?", answer: "a."}, question="q?", answers=["a."], context=None)
        for name in ("context", "passage", "background", "article", "story", "support", "Kontext"):
            self.assert_read({"question": "q", "answer": "a", name: "long"}, context="long")
        for name in ("system", "system_prompt", "System Message"):
            self.assert_read({"question": "q", "answer": "a", name: "Be terse."}, system="Be terse.")

    def test_an_instruction_beside_a_question_stands_before_it_and_an_input_is_its_context(self) -> None:
        self.assert_read({"instruction": "Be exact.", "question": "q", "answer": "a"}, question="Be exact.\n\nq")
        self.assert_read({"instruction": "do", "input": "with", "output": "done"}, question="do", context="with")
        self.assert_read({"question": "q", "input": "with", "output": "done"}, question="q", context="with")
        self.assert_read({"instruction": "do", "context": "", "response": "done", "category": "x"}, context=None)

    def test_contexts_of_several_passages(self) -> None:
        row = {"question": "q", "answer": "a"}
        self.assert_read({**row, "contexts": ["one", "two"]}, context="one\n\ntwo")
        self.assert_read({**row, "context": {"contexts": ["one"], "labels": ["X"]}}, context="one")
        hotpot = {"title": ["T", "U"], "sentences": [["One. ", "Two."], ["Three."]]}
        self.assert_read({**row, "context": hotpot}, context="T\nOne. Two.\n\nU\nThree.")
        self.assert_read({**row, "ctxs": [{"title": "T", "text": "one"}]}, context="T\none")

    def test_squad_as_published_and_its_impossible_questions(self) -> None:
        answers = [{"text": "x", "answer_start": 0}, {"text": "y", "answer_start": 1}]
        qas = [
            {"id": "a", "question": "q1", "answers": answers, "is_impossible": False},
            {"id": "b", "question": "q2", "answers": [], "is_impossible": True, "plausible_answers": answers},
        ]
        article = {"title": "Heat", "paragraphs": [{"context": "x y", "qas": qas}]}
        for content, name in (
            (json.dumps({"version": "v2.0", "data": [article]}, indent=1), "squad.json"),
            (json.dumps(article), "articles.jsonl"),
        ):
            examples, found = self.read_file(content, name)
            self.assertEqual([(e["id"], e["document"], e["context"]) for e in examples], [("a", "Heat", "x y")])
            self.assertEqual((examples[0]["answers"], found.rows, found.dropped), (["x", "y"], 2, {"unanswerable": 1}))

    def test_files_that_are_one_object_around_their_rows(self) -> None:
        rows = [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]
        for around in ({"data": rows}, {"version": 1, "examples": rows}, {"rows": [{"row": row} for row in rows]}):
            self.assertEqual(len(self.read_file(json.dumps(around), "x.json")[0]), 2)

    def test_answers_in_objects(self) -> None:
        trivia = {"value": "Paris", "aliases": ["City of Light"], "type": "WikipediaEntity"}
        self.assert_read({"question": "q", "answer": trivia}, answers=["Paris", "City of Light"])
        self.assert_read({"question": "q", "answers_spans": {"spans": ["4 bar"], "types": ["span"]}}, answers=["4 bar"])

    def test_choices_wherever_they_stand_and_however_the_right_one_is_named(self) -> None:
        texts = ["Red", "Blue", "Green"]
        letters = dict(zip("ABC", texts, strict=True))
        keyed = [{"key": key, "value": text} for key, text in letters.items()]
        columns = {f"option_{letter}": text for letter, text in letters.items()}
        numbered = {f"choice{n}": text for n, text in enumerate(texts, 1)}
        for row in (
            {"options": texts, "answer": "B"},
            {"options": letters, "answer": "B", "answer_idx": "B"},
            {"options": letters, "answer": "Blue", "answer_idx": "B"},
            {"options": keyed, "answer_idx": "B"},
            {"choices": texts, "answer": "(b)"},
            {"choices": texts, "answer": "B) Blue"},
            {"choices": texts, "answer": 1},
            {"choices": texts, "answer_index": "1"},
            {"choices": texts, "label": 1},
            {"endings": texts, "label": "1"},
            {"choices": {"text": texts, "label": ["1", "2", "3"]}, "answerKey": "2"},
            {**letters, "answer": "B"},
            {**columns, "correct_option": "b"},
            {**numbered, "answer": "Blue"},
            {"opa": "Red", "opb": "Blue", "answer": "B"},
        ):
            example = self.one({"question": "q", **row})
            self.assertEqual((example["answers"], example["answer_index"]), (["Blue"], 1), row)
        science = {"question": "q", "correct_answer": "Blue", "distractor1": "Red", "distractor2": "Green"}
        self.assert_read(science, choices=["Blue", "Red", "Green"], answer_index=0)
        gpqa = {"Question": "q", "Correct Answer": "Blue", "Incorrect Answer 1": "Red", "Incorrect Answer 2": "Green"}
        self.assert_read(gpqa, choices=["Blue", "Red", "Green"], answers=["Blue"])

    def test_letters_and_indices_in_csv(self) -> None:
        cells = 'question,choices,answer\nq1,"[""Red"", ""Blue""]",1\nq2,"[""Red"", ""Blue""]",A\n'
        self.assertEqual([e["answers"] for e in self.read_file(cells, "x.csv")[0]], [["Blue"], ["Red"]])

    def test_numbers_that_may_count_from_0_or_1_are_settled_by_the_file_or_asked_about(self) -> None:
        def rows(*numbers: int) -> list[dict[str, Any]]:
            return [
                {"question": f"q{i}", "A": "Red", "B": "Blue", "C": "Green", "answer": n} for i, n in enumerate(numbers)
            ]

        self.assertEqual([e["answers"][0] for e in self.read(*rows(1, 3, 2))[0]], ["Red", "Green", "Blue"])
        self.assertEqual([e["answers"][0] for e in self.read(*rows(1, 0, 2))[0]], ["Blue", "Red", "Green"])
        self.assertIn("answer_number=COLUMN", self.refused(*rows(1, 2)))
        found, _ = self.read(*rows(1, 2), columns=("answer_number=answer",))
        self.assertEqual([e["answers"][0] for e in found], ["Red", "Blue"])

    def test_a_letter_without_its_choices_is_refused_where_a_column_holds_a_list(self) -> None:
        row = {"question": "q", "variants": ["Red", "Blue"], "answer": "B"}
        self.assertIn("--data.columns choices=variants", self.refused(row))
        self.assertEqual(self.one(row, columns=("choices=variants",))["answers"], ["Blue"])
        _, found = self.read({"question": "Which? A) Red B) Blue", "answer": "B"})
        self.assertIn("the answer is a single letter, and the row has no choices", found.notes)

    def test_choices_that_contradict_each_other_are_refused(self) -> None:
        row = {"question": "q", "options": ["Red", "Blue"], "answer": "A"}
        self.assertIn("different choices", self.refused({**row, "answer_idx": "B"}))
        self.assertIn("answerKey is not one of the choice labels", self.refused({**row, "answerKey": "E"}))

    def test_missing_cells_of_parquet_and_normal_forms(self) -> None:
        self.assert_read({"instruction": "q", "input": float("nan"), "output": "a"}, context=None)
        self.assert_read(
            {"question": "q", "choices": ["Ju\u0308rgen", "Otto"], "answer": "J\u00fcrgen"}, answer_index=0
        )


class Columns(Pairs):
    def test_any_columns_are_mapped_by_the_flag(self) -> None:
        row = {"ask": "q", "reply": "a", "extra": "c", "url": "x/y.html"}
        columns = ("question=ask", "answers=reply", "context=extra", "source=url")
        examples, found = self.read(row, columns=columns)
        self.assertEqual((examples[0]["question"], examples[0]["answers"], examples[0]["context"]), ("q", ["a"], "c"))
        self.assertEqual(found.columns["question"], {"ask": 1})
        self.assertEqual(found.columns_not_used, {})

    def test_a_column_that_was_said_wins_over_the_usual_names(self) -> None:
        row = {"question": "usual", "ask": "said", "answer": "a", "response": "other"}
        examples, found = self.read(row, columns=("question=ask", "answer=response"))
        self.assertEqual((examples[0]["question"], examples[0]["answers"]), ("said", ["other"]))
        self.assertEqual(found.columns_not_used, {"question": 1, "answer": 1})

    def test_a_mapped_column_that_is_nowhere_is_refused_with_those_that_are(self) -> None:
        message = self.refused({"question": "q", "answer": "a"}, columns=("context=passages",))
        self.assertIn("names a column that is in no row (got \"['passages']\")", message)
        self.assertIn("its columns are question, answer", message)

    def test_the_refusal_of_unknown_columns_names_them_and_the_flag_that_maps_them_once(self) -> None:
        rows = [{"Stichwort": f"Was tut Ventil {n}?", "Erklärung": "Es schließt.", "Thema": "V"} for n in range(30)]
        message = self.refused(*rows)
        self.assertIn("unknown shape (got 'columns stichwort, erklärung, thema')", message)
        self.assertIn("--data.columns question=stichwort,answer=erklärung", message)
        self.assertNotIn("problems", message)
        self.assertEqual(len(self.read(*rows, columns=("question=stichwort", "answer=Erklärung"))[0]), 30)
        self.assertIn("--data.columns answer=reaction", self.refused({"question": "q?", "reaction": "a"}))

    def test_of_columns_that_are_equally_likely_all_are_named(self) -> None:
        row = {"nr": "7", "ask": "Which valve?", "category": "valves", "reaction": "Close it."}
        message = self.refused(row)
        self.assertIn("--data.columns question=ask,answer=category (it may be answer=reaction or answer=nr);", message)
        row = {"kundenfrage": "Which valve?", "gruppe": "Is it one?", "musterantwort": "Close it.", "notiz": "x"}
        self.assertIn("--data.columns question=kundenfrage,answer=musterantwort;", self.refused(row))

    def test_two_languages_in_one_file_are_a_question(self) -> None:
        row = {
            "frage": "Was tut es?",
            "question": "What does it do?",
            "antwort": "Es schließt.",
            "answer": "It closes.",
        }
        message = self.refused(row)
        self.assertIn("2 columns could be the question: question, frage", message)
        self.assertIn("--data.columns question=question,answer=answer (or question=frage)", message)
        self.assertEqual(self.one(row, columns=("question=frage", "answer=antwort"))["answers"], ["Es schließt."])
        half = {"frage": "Was tut es?", "antwort": "Es schließt.", "respuesta": "Lo cierra."}
        self.assertIn("2 columns could be the answer: antwort, respuesta", self.refused(half))

    def test_two_columns_that_could_be_the_answer_are_a_question_unless_they_agree(self) -> None:
        row = {"problem": "q", "solution": "so it is 4", "answer": "4"}
        self.assertIn("2 columns could be the answer: answer, solution", self.refused(row))
        self.assertEqual(self.one(row, columns=("answer=answer",))["answers"], ["4"])
        self.assertEqual(self.one({**row, "solution": "4"})["answers"], ["4"])
        self.assertIn(
            "could be the context", self.refused({"question": "q", "answer": "a", "context": "c", "passage": "p"})
        )

    def test_a_column_whose_values_cannot_have_the_role_is_not_used(self) -> None:
        _, found = self.read({"question": "q", "answer": "fine", "support": 3, "turns": 1, "chat": "no list"})
        self.assertEqual(found.columns_not_used, {"support": 1, "turns": 1, "chat": 1})
        self.assertEqual(self.one({"messages": Conversations.TURNS, "turns": 2})["answers"], ["Two."])

    def test_what_was_not_used_and_what_was_is_said(self) -> None:
        rows = [{"instruction": "q", "response": f"a{n}", "category": "open"} for n in range(2)]
        examples, found = self.read(*rows, {"instruction": "r", "response": "b", "extra": {"x": 1}})
        self.assertEqual(found.columns, {"question": {"instruction": 3}, "answer": {"response": 3}})
        shown = "\n".join(report.lines("pairs.jsonl", found.to_json()))
        self.assertIn("columns not used: category (2 rows), extra (1 rows)", shown)
        self.assertIn("question   <- instruction", shown)
        self.assertEqual(len(examples), 3)

    def test_every_role_of_the_flag_is_known(self) -> None:
        known = {
            *column_roles.STRONG,
            "choices",
            "answer_index",
            "answer_number",
            "document",
            "source",
            "ignore",
            *column_roles.ALIASES,
        }
        self.assertEqual(set(COLUMN_ROLES), known)


class Conversations(Pairs):
    TURNS: ClassVar[list[dict[str, Any]]] = [USER, said("One."), {"role": "user", "content": "And?"}, said("Two.")]

    def test_other_spellings_of_the_same_conversation(self) -> None:
        expected = self.one({"messages": self.TURNS})
        sharegpt = [
            {"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in self.TURNS
        ]
        columns = {"role": [t["role"] for t in self.TURNS], "content": [t["content"] for t in self.TURNS]}
        pairs = [{"human": "Why?", "assistant": "One."}, {"human": "And?", "assistant": "Two."}]
        for row in (
            {"conversations": sharegpt},
            {"messages": json.dumps(self.TURNS)},
            {"messages": columns},
            {"conversation": pairs},
            {"prompt": self.TURNS[:3], "completion": self.TURNS[3:]},
            {"prompt": self.TURNS[:3], "response": "Two."},
            {"question": "And?", "answer": "Two.", "history": [["Why?", "One."]]},
            {"dialog": self.TURNS},
        ):
            found = self.one(row)
            for name in ("history", "question", "answers"):
                self.assertEqual(found[name], expected[name], row)

    def test_system_turns_and_a_system_column_are_both_kept(self) -> None:
        turns = [{"role": "system", "content": "One."}, {"role": "developer", "content": "Two."}, USER, said("a")]
        self.assertEqual(self.one({"messages": turns, "system": "Zero."})["system"], "Zero.\n\nOne.\n\nTwo.")
        self.assertEqual(self.one({"messages": turns, "system": "One."})["system"], "One.\n\nTwo.")

    def test_earlier_turns_and_what_is_cut_are_counted(self) -> None:
        _, found = self.read({"messages": [said("Hello."), *self.TURNS, USER]}, {"messages": [USER, said("x")]})
        self.assertEqual(found.earlier_turns, {"trained": 1, "context": 1})
        self.assertEqual(found.notes, {"turns after the last answer that is trained: cut": 1})

    def test_tool_calls_and_results_are_turns_whatever_wrote_them(self) -> None:
        tools = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}]
        answered = [
            USER,
            said("", tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "c1", "content": "4"},
            said("It is 4."),
        ]
        sharegpt = [
            {"from": "human", "value": "Why?"},
            {"from": "function_call", "value": '{"name": "read", "arguments": {"id": "7"}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "It is 4."},
        ]
        parts = [
            USER,
            said([{"type": "tool_use", "id": "c1", "name": "read", "input": {"id": "7"}}]),  # type: ignore[arg-type]
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "4"}]},
            said("It is 4."),
        ]
        for row in (
            {"messages": answered, "tools": tools},
            {"conversations": sharegpt, "tools": json.dumps([tools[0]["function"]])},
            {"messages": parts, "tools": tools},
        ):
            example = self.one(row)
            self.assertEqual((example["question"], example["answers"], example["tools"]), ("Why?", ["It is 4."], tools))
            called, result = example["tool_turns"]
            self.assertEqual(called["tool_calls"][0]["function"], READ["function"])
            self.assertEqual((result["role"], result["content"]), ("tool", "4"))
        calling = self.one({"messages": answered[:2], "tools": tools})
        self.assertEqual((calling["answers"], calling["tool_calls"]), ([""], [READ]))
        xlam = self.one({"query": "Why?", "answers": '[{"name": "read", "arguments": {"id": "7"}}]', "tools": tools})
        self.assertEqual(xlam["tool_calls"][0]["function"], READ["function"])

    def test_pictures_and_sound_are_left_out_by_row(self) -> None:
        good = {"messages": [USER, said("a")]}
        for row in (
            {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]},
            {"question": "What?", "answer": "x", "image": "a.png"},
            {**good, "images": ["a.png"]},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "?"}]},
                    said("x"),
                ]
            },
            {"question": "q", "answer": "x", "audio": {"path": "a.wav"}},
        ):
            examples, found = self.read(row, good)
            self.assertEqual((len(examples), found.dropped), (1, {marks.PICTURES: 1}), row)
        self.assertEqual(self.one({"question": "What does <image> in SVG do?", "answer": "x"})["answers"], ["x"])

    def test_keys_of_turns_that_are_not_used_are_named(self) -> None:
        _, found = self.read({"messages": [USER, said("fine", mood="happy")]})
        self.assertEqual(found.notes, {"key of a turn not used: mood": 1})

    def test_leaks_and_duplicates_see_the_whole_conversation(self) -> None:
        thanks = [{"role": "user", "content": "Thanks!"}, said("You're welcome!")]
        one, two = ([{"role": "user", "content": f"Unit {n}?"}, said(f"{n} bar."), *thanks] for n in range(2))
        examples, found = self.read({"messages": one}, {"messages": two}, {"messages": one})
        self.assertEqual((len(examples), found.dropped), (2, {"duplicate": 1}))
        self.assertEqual(leaks(examples[:1], examples[1:]), [])
        self.assertEqual(len(leaks(examples[:1], [{**examples[0], "question": "THANKS! "}])), 1)
        # an earlier turn is trained too, so a pair that asks only that is a leak
        first = self.one({"messages": one[:2]})
        self.assertEqual((leaks(examples[:1], [first]), leaks([first], examples[:1])), ([first], [examples[0]]))
        pair = {"question": "Tense?", "answer": "past"}
        rows = [{**pair, "system": "German"}, {**pair, "system": "French"}, {**pair, "choices": ["past", "now"]}]
        rows += [{**pair, "choices": ["past", "then"]}, {**pair, "reasoning": "because"}]
        self.assertEqual(self.read(*rows)[1].dropped, {})


class Documents(Pairs):
    def test_files_and_addresses_name_documents(self) -> None:
        for column in ("url", "file", "filename", "file_path", "document", "doc_id", "title"):
            rows = [{"question": f"q{n}", "answer": "a b", column: f"d{n % 3}"} for n in range(12)]
            examples, found = self.read(*rows)
            self.assertEqual([e["document"] for e in examples], [f"d{n % 3}" for n in range(12)])
            self.assertEqual((list(found.documents["document"]), found.rows_without_document), ([column], 0))

    def test_a_source_that_names_collections_is_no_document(self) -> None:
        for names in (["airoboros"] * 30 + ["camel"] * 10, ["airoboros", "camel"] * 20, ["a", "b", "c", "d"] * 10):
            rows = [{"question": f"q{n}", "answer": "a b", "source": name} for n, name in enumerate(names)]
            examples, found = self.read(*rows)
            self.assertEqual(len({e["document"] for e in examples}), 40, names[:2])
            self.assertIn("source", found.documents["not_document"])
        said_so, found = self.read(*rows, columns=("document=source",))
        self.assertEqual({e["document"] for e in said_so}, {"a", "b", "c", "d"})
        files = [{"question": f"q{n}", "answer": "a b", "source": f"{n % 3}.pdf"} for n in range(40)]
        self.assertEqual(len({e["document"] for e in self.read(*files)[0]}), 3)

    def test_a_document_that_holds_most_rows_is_divided_by_its_headings_or_said(self) -> None:
        rows = [{"question": f"q{n}", "answer": "a b", "document": "handbook.md"} for n in range(30)]
        _, found = self.read(*rows)
        self.assertEqual(found.documents["most"], "`document`: 'handbook.md' holds 30 of 30 rows")
        examples, found = self.read(*({**row, "section": f"Part {n % 5}"} for n, row in enumerate(rows)))
        self.assertEqual({e["document"] for e in examples}, {f"handbook.md > Part {n}" for n in range(5)})
        self.assertNotIn("most", found.documents)

    def test_pairs_of_one_context_are_one_document_where_no_column_names_any(self) -> None:
        rows = [{"question": f"q{n}", "answer": "a b", "context": f"c{n % 2}"} for n in range(4)]
        examples, found = self.read(*rows)
        first, second = examples[0]["id"], examples[1]["id"]
        self.assertEqual([e["document"] for e in examples], [first, second, first, second])
        self.assertEqual(found.rows_without_document, 4)

    def test_what_splits_and_the_file_of_the_corpus_are_two_columns(self) -> None:
        def corpus(wanted: Any) -> set[str]:
            return {"pump.md"} & set(wanted)

        rows = [
            {"question": f"q{n}", "answer": "a b", "title": f"Part {n}", "source": "docs/pump.md"} for n in range(5)
        ]
        content = "".join(json.dumps(row) + "\n" for row in rows)
        examples, found = self.read_file(content, "x.jsonl", corpus=corpus)
        self.assertEqual(
            [(e["document"], e["source"]) for e in examples], [(f"Part {n}", "docs/pump.md") for n in range(5)]
        )
        self.assertEqual(found.documents["source"], "source")


class Files(Pairs):
    ROWS = 'question;answer\nWarum?;"Weil; eben"\nWann, genau?;Montag\n'
    EXPECTED: ClassVar[list[tuple[str, str]]] = [("Warum?", "Weil; eben"), ("Wann, genau?", "Montag")]

    def pairs_of(self, content: str | bytes, name: str) -> list[tuple[str, str]]:
        return [(e["question"], e["answers"][0]) for e in self.read_file(content, name)[0]]

    def test_dialects_of_csv(self) -> None:
        for mark in (";", "\t", "|", ","):
            cells = [["question", "answer"], ["Warum?", "Weil; eben"], ["Wann, genau?", "Montag"]]
            content = "\n".join(mark.join(f'"{c}"' if mark in c else c for c in row) for row in cells)
            self.assertEqual(self.pairs_of(content, "x.csv"), self.EXPECTED, mark)
        for content in (
            "sep=;\n" + self.ROWS,
            self.ROWS.replace("\n", "\r"),
            self.ROWS.replace("\n", "\r\n"),
            "\ufeff" + self.ROWS,
            self.ROWS + ";\n\n",
            self.ROWS.encode("utf-16"),
        ):
            self.assertEqual(self.pairs_of(content, "x.csv"), self.EXPECTED, content[:12])
        with self.assertRaisesRegex(DataError, r"x.csv:4: 1 cells, but the first line names 2"):
            self.read_file("sep=;\n" + self.ROWS.replace(";Montag", ""), "x.csv")

    def test_an_excel_export_in_german(self) -> None:
        content = "Frage;Antwort;Thema\nWann ölen?;Montags;Pumpe\nWer?;Schichtleiter;Leute\n"
        examples, found = self.read_file(content, "x.csv")
        self.assertEqual([e["answers"] for e in examples], [["Montags"], ["Schichtleiter"]])
        self.assertEqual(found.columns_not_used, {"thema": 2})
        said = list(report.lines("x.csv", found.to_json()))[-1]
        flag = said.split("--data.columns ")[1]
        examples, found = self.read_file(content, "x.csv", columns=(flag,))
        self.assertEqual([e["document"] for e in examples], ["Pumpe", "Leute"])
        self.assertNotIn("keep those together", "\n".join(report.lines("x.csv", found.to_json())))
        with self.assertRaisesRegex(DataError, "WINDOWS-1252"):
            self.read_file(content.encode("cp1252"), "y.csv")

    def test_json_whatever_the_file_is_called_and_compressed(self) -> None:
        rows = [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        for content, name in (
            (json.dumps(rows), "x.jsonl"),
            (json.dumps(rows, indent=1), "x.jsonl"),
            (lines, "x.json"),
            (gzip.compress(lines), "x.jsonl.gz"),
            (bz2.compress(lines), "x.jsonl.bz2"),
            (pyarrow.compress(lines, "zstd", asbytes=True), "x.jsonl.zst"),
            (gzip.compress(b"question,answer\nq,a\nr,b"), "x.csv.gz"),
        ):
            self.assertEqual(self.pairs_of(content, name), [("q", "a"), ("r", "b")], name)
        for content in (gzip.compress(lines)[:-9], b"\x1f\x8b" + lines, b"no gzip"):
            with self.assertRaisesRegex(DataError, r"x.jsonl.gz: cannot be read"):
                self.read_file(content, "x.jsonl.gz")

    def test_workbooks(self) -> None:
        rows = [
            ["Frage", "Antwort", "Thema"],
            ["Wann ölen?", "Montags", "Pumpe"],
            ["Wie viele?", 12, "Bolzen"],
            [None] * 3,
        ]
        examples, found = self.read_file(workbook(rows), "x.xlsx")
        self.assertEqual([e["answers"] for e in examples], [["Montags"], ["12"]])
        self.assertEqual((found.rows, found.columns_not_used), (2, {"thema": 2}))
        self.assertEqual(
            self.read_file(workbook(rows, [], rows[:1] + rows[1:2]), "x.xlsx")[1].dropped, {"duplicate": 1}
        )
        with self.assertRaisesRegex(DataError, "2 sheets with different columns"):
            self.read_file(workbook(rows, [["Notes"], ["to do"]]), "x.xlsx")
        with self.assertRaisesRegex(DataError, "not readable as a workbook"):
            self.read_file(b"PK\x03\x04 no workbook", "x.xlsx")

    def test_a_key_twice_and_a_name_twice_are_refused(self) -> None:
        with self.assertRaisesRegex(DataError, r"x.jsonl:1: the key 'answer' twice in one object"):
            self.read_file('{"question": "q", "answer": "a", "answer": "b"}', "x.jsonl")
        self.assertIn("same name but for case", self.refused({"question": "q", "Answer": "a", "answer": "b"}))

    def test_characters_that_nobody_sees(self) -> None:
        rows = [
            {"question": "Bell?", "answer": "ri\x07ng\r\nx\u0096y"},
            {"question": "q\u200b", "answer": "\ufeffwell"},
        ]
        examples, found = self.read(*rows)
        self.assertEqual([e["answers"][0] for e in examples], ["ring\nx\u2013y", "well"])
        self.assertEqual(sum(found.notes.values()), 2)
        self.assertIn("empty answer", self.refused({"question": "q", "answer": "\u200b\ufeff"}))

    def test_rows_that_a_chat_template_wrote_are_refused(self) -> None:
        row = {"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "completion": "a<|im_end|>"}
        self.assertIn("hold the marks of a chat (got '<|im_start|>')", self.refused(row, {**row, "completion": "b"}))
        other = [{"question": f"q{n}", "answer": "a"} for n in range(3)]
        _, found = self.read(row, *other)
        self.assertEqual(found.notes["marks of a chat stand in the text, and are trained as text"], 1)
        _, found = self.read({"question": "q", "answer": "['a', 'b']"})
        self.assertTrue(any("list that was written as text" in note for note in found.notes))


if __name__ == "__main__":
    unittest.main()
