"""What other tools write: labelled pairs in their columns and files, documents in their markup."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

from tests.test_data_examples import TaskTest
from tests.test_data_extraction import Files, at
from tests.test_data_labelled import workbook
from utils.data.extraction.formats import read_file
from utils.data.extraction.text_decoding import decode
from utils.data.splits import leaks


def numbered(pairs: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"question": f"How deep is well {n}?", "answer": f"{n} metres.", **columns} for n in range(pairs)]


class Marks(TaskTest):
    def test_reviews_in_words_and_booleans_are_obeyed(self) -> None:
        for column, good, bad in (
            ("review_status", "Approved", "rejected"),
            ("feedback", "thumbs-up", "thumbs-down"),
            ("approved", True, False),
            ("excluded", "false", "true"),
            ("label", "good", "bad"),
        ):
            rows = [{**row, column: bad if n % 2 else good} for n, row in enumerate(numbered(4))]
            examples, report = self.read(self.rows(*rows))
            self.assertEqual([e["answers"] for e in examples], [["0 metres."], ["2 metres."]], column)
            self.assertEqual(report.dropped, {"marked as a wrong answer": 2}, column)

    def test_a_verdict_that_is_asked_for_is_the_answer(self) -> None:
        self.assertEqual(self.one({"question": "q", "answer": "Wrong", "verdict": "wrong"})["answers"], ["Wrong"])
        self.assertEqual(self.one({"question": "q", "answer": "a", "status": "submitted"})["answers"], ["a"])

    def test_zeros_and_ones_of_a_csv_are_marks(self) -> None:
        examples, report = self.read(self.write("a.csv", "prompt,completion,label\nq,bad,0\nr,fine,1\n"))
        self.assertEqual([e["answers"] for e in examples], [["fine"]])
        self.assertEqual(report.columns["mark"], {"label": 1})

    def test_rival_answers_are_refused_and_none_is_proposed_alone(self) -> None:
        asked = {"role": "user", "content": "Hm?"}
        for row in (
            {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "model_b"},
            {"question": "q", "answer_0": "x", "answer_1": "y", "score_0": 1, "score_1": -1},
        ):
            self.assertIn("rival answers", self.error(self.rows(row)))
        openai = {"input": {"messages": [asked]}, "preferred_output": [], "non_preferred_output": [asked]}
        self.assertIn("preference data", self.error(self.rows(openai)))

    def test_preferences_as_trl_and_hh_rlhf_keep_them(self) -> None:
        asked, said = [{"role": "user", "content": "Hm?"}], [{"role": "assistant", "content": "Deep."}]
        row = {"prompt": asked, "chosen": said, "rejected": said}
        self.assertIn("--data.columns answer=chosen", self.error(self.rows(row)))
        self.assertIn("--data.columns messages=chosen", self.error(self.rows({**row, "chosen": asked + said})))
        text = "\n\nHuman: Hm?\n\nAssistant: {}"
        message = self.error(self.rows({"chosen": text.format("Deep."), "rejected": text.format("No.")}))
        self.assertIn("write the turns of `chosen` as `messages`", message)

    def test_answers_of_annotators_with_their_status(self) -> None:
        answers = [{"user_id": "x", "value": "Deep.", "status": "submitted"}]
        answers += [{"user_id": "y", "value": "No.", "status": "discarded"}]
        self.assertEqual(self.one({"instruction": "q", "response": answers})["answers"], ["Deep."])
        rows = [{"instruction": "q", "response": answers}, {"instruction": "r", "response": answers[1:]}]
        self.assertEqual(self.read(self.rows(*rows))[1].dropped, {"marked as not to be trained": 1})

    def test_posts_of_a_forum_are_not_all_right(self) -> None:
        answers = [{"text": "Dig deeper.", "pm_score": 4}, {"text": "Go home.", "pm_score": -3}]
        self.assertIn("ranked by pm_score", self.error(self.rows({"question": "q", "answers": answers})))

    def test_a_models_response_beside_the_reference_is_asked_about(self) -> None:
        row = {"user_input": "q", "retrieved_contexts": ["c"], "response": "nonsense", "reference": "right"}
        self.assertIn("2 columns could be the answer: response, reference", self.error(self.rows(row)))
        examples, _ = self.read(self.rows(row), columns=["answer=reference"])
        self.assertEqual((examples[0]["answers"], examples[0]["context"]), (["right"], "c"))
        found = self.one({"input": "q", "actual_output": "nonsense", "expected_output": "right"})
        self.assertEqual(found["answers"], ["right"])

    def test_a_picture_between_tags_is_a_picture(self) -> None:
        rows = [*numbered(2), {"question": "Picture 1: <img>well.jpg</img>\nHow deep?", "answer": "Deep."}]
        _, report = self.read(self.rows(*rows))
        self.assertEqual(report.dropped, {"a picture, sound or film, which a text model cannot read": 1})


class Choices(TaskTest):
    def test_more_than_eight_choices_have_letters_too(self) -> None:
        row = {"question": "q", "options": [f"answer {n}" for n in range(10)], "answer": "J", "answer_index": 9}
        self.assert_fields(self.one(row), answers=["answer 9"], answer_index=9)

    def test_letters_of_other_scripts(self) -> None:
        row = {"вопрос": "q", "А": "один", "Б": "два", "В": "три", "ответ": "В"}
        self.assert_fields(self.one(row), choices=["один", "два", "три"], answers=["три"])
        row = {"質問": "q", "選択": "", "ア": "一", "イ": "二", "回答": "イ"}
        self.assert_fields(self.one(row), choices=["一", "二"], answers=["二"])

    def test_kahoots_template(self) -> None:
        names = ["", "Question - max 120 characters", *(f"Answer {n} - max 75 characters" for n in (1, 2, 3, 4))]
        names += ["Time limit (sec) – 5 or 10 secs", "Correct answer(s) - choose at least one"]
        above = ["Quiz template,,,,,,,", '"Add questions, at least two. Have fun!",,,,,,,', ",,,,,,,"]
        rows = [f"{n},Which is {n}?,red {n},blue {n},green {n},,20,{1 + n % 3}" for n in range(1, 7)]
        path = self.write("task.csv", "\n".join([*above, ",".join(names), *rows]))
        with self.assertLogs("adapters", "WARNING"):
            examples, report = self.read(path)
        self.assertEqual(examples[0]["choices"], ["red 1", "blue 1", "green 1"])
        self.assertEqual([e["answers"][0] for e in examples[:3]], ["blue 1", "green 2", "red 3"])
        self.assertEqual(report.columns["answer"], {"correct_answers": 6})

    def test_a_key_may_be_the_name_of_a_column(self) -> None:
        row = {"question": "q", "option_a": "x", "option_b": "y", "correct_option": "Option B"}
        self.assert_fields(self.one(row), choices=["x", "y"], answers=["y"])

    def test_answers_that_say_which_is_right(self) -> None:
        answers = [{"text": "x", "correct": False}, {"text": "y", "correct": True}, {"text": "z", "correct": False}]
        self.assert_fields(self.one({"question": "q", "answers": answers}), choices=["x", "y", "z"], answers=["y"])
        answers[0]["correct"] = True
        self.assertIn("2 of the 3 objects", self.error(self.rows({"question": "q", "answers": answers})))

    def test_choices_inside_the_question(self) -> None:
        listed = [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]
        row = {"id": "1", "question": {"stem": "q", "choices": listed}, "answerKey": "B"}
        self.assert_fields(self.one(row), question="q", choices=["x", "y"], answers=["y"])


class Shapes(TaskTest):
    def test_columns_in_objects(self) -> None:
        found = self.one({"inputs": {"question": "q"}, "outputs": {"answer": "deep"}, "run": {"input": 3, "output": 4}})
        self.assert_fields(found, question="q", answers=["deep"], context=None)

    def test_metadata_names_the_document(self) -> None:
        rows = [{**row, "metadata": {"source": f"m{n // 3}.pdf", "page": n}} for n, row in enumerate(numbered(9))]
        examples, report = self.read(self.rows(*rows))
        self.assertEqual({e["document"] for e in examples}, {"m0.pdf", "m1.pdf", "m2.pdf"})
        self.assertIn("source", report.documents["document"])

    def test_places_of_a_page_are_one_document(self) -> None:
        rows = [{**row, "url": f"https://x.org/p{n // 3}.html#s{n}"} for n, row in enumerate(numbered(9))]
        examples, _ = self.read(self.rows(*rows))
        self.assertEqual(len({e["document"] for e in examples}), 3)
        rows = [{**row, "document": f"faq.jsonl#{n}"} for n, row in enumerate(numbered(9))]
        self.assertEqual(len({e["document"] for e in self.read(self.rows(*rows))[0]}), 9)

    def test_one_context_for_all_is_no_document(self) -> None:
        examples, report = self.read(self.rows(*numbered(12, context="You are brief.")))
        self.assertEqual(len({e["document"] for e in examples}), 12)
        self.assertIn("12 of 12 rows", report.documents["not_document"]["context"])

    def test_other_tools_are_other_conversations(self) -> None:
        tool = {"type": "function", "function": {"name": "north", "parameters": {}}}
        example = self.one({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
        self.assertEqual(leaks([{**example, "tools": [tool]}], [example]), [])
        self.assertEqual(len(leaks([example], [example])), 1)

    def test_gemini(self) -> None:
        call, result = {"name": "depth", "args": {"well": 3}}, {"name": "depth", "response": {"metres": 9}}
        contents = [
            {"role": "user", "parts": [{"text": "q"}]},
            {"role": "model", "parts": [{"functionCall": call}]},
            {"role": "user", "parts": [{"functionResponse": result}]},
            {"role": "model", "parts": [{"text": "a"}]},
        ]
        tools = [{"functionDeclarations": [{"name": "depth"}]}]
        found = self.one({"systemInstruction": {"parts": [{"text": "s"}]}, "contents": contents, "tools": tools})
        self.assertEqual((found["system"], found["question"], found["answers"]), ("s", "q", ["a"]))
        self.assertEqual(found["tools"][0]["function"]["name"], "depth")
        called, answered = found["tool_turns"]
        self.assertEqual(called["tool_calls"][0]["function"]["arguments"], {"well": 3})
        self.assertEqual(json.loads(answered["content"]), {"metres": 9})

    def test_anthropics_tools_have_their_parameters(self) -> None:
        tools = [{"name": "depth", "input_schema": {"type": "object", "properties": {"well": {"type": "string"}}}}]
        found = self.one({"question": "q", "answer": "a", "tools": tools})
        self.assertEqual(list(found["tools"][0]["function"]["parameters"]["properties"]), ["well"])

    def test_conversations_of_other_kinds(self) -> None:
        found = self.one({"dialog": ["q", "a", "r", "so"], "act": [1, 2, 1, 2]})
        self.assertEqual((found["question"], found["answers"], len(found["history"])), ("r", ["so"], 2))
        items = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
        self.assertEqual(self.one({"id": "x", "system": "s", "items": items})["system"], "s")
        turns = [{"speaker": who, "utterance": who} for who in ("customer", "agent", "agent")]
        self.assertEqual(self.one({"turns": turns})["answers"], ["agent\n\nagent"])
        self.assertIn("`chat` is one text", self.error(self.rows({"chat": "USER: q ASSISTANT: a"})))
        silent = [{"role": who, "content": text} for who, text in (("user", "q"), ("assistant", ""), ("user", "r"))]
        found = self.one({"messages": [*silent, {"role": "assistant", "content": "a"}]})
        self.assertTrue(found["history"][1]["untrained"])


class Tables(TaskTest):
    def test_forms_of_json(self) -> None:
        names, rows = ["question", "answer"], [["q", "a"], ["r", "b"], ["s", "c"]]
        columns = {name: {str(n): row[place] for n, row in enumerate(rows)} for place, name in enumerate(names)}
        objects = [dict(zip(names, row, strict=True)) for row in rows]
        for text in (
            json.dumps(columns),
            json.dumps({"columns": names, "index": [0, 1, 2], "data": rows}),
            json.dumps({name: [row[place] for row in rows] for place, name in enumerate(names)}),
            json.dumps({f"id{n}": one for n, one in enumerate(objects)}),
            json.dumps({"response_code": 0, "results": objects}),
            "\n".join(json.dumps(one, indent=2) for one in objects),
            "".join(f"{json.dumps(one)},\n" for one in objects),
        ):
            examples, _ = self.read(self.write("task.json", text))
            self.assertEqual(
                [(e["question"], e["answers"]) for e in examples], [("q", ["a"]), ("r", ["b"]), ("s", ["c"])]
            )

    def test_what_stands_beside_a_list_of_rows_belongs_to_them(self) -> None:
        content = {"context": "The well.", "qas": [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]}
        examples, _ = self.read(self.write("task.json", json.dumps(content)))
        self.assertEqual([e["context"] for e in examples], ["The well.", "The well."])

    def test_titles_above_the_names_are_passed_over(self) -> None:
        for above in ("Wells,,\nExported 2024,,\n", "Report: wells\n"):
            text = above + "Question,Answer,Depth\n" + "".join(f"q{n},a{n},{n}\n" for n in range(5))
            with self.assertLogs("adapters", "WARNING") as said:
                examples, _ = self.read(self.write("task.csv", text))
            self.assertEqual([e["question"] for e in examples], [f"q{n}" for n in range(5)])
            self.assertIn("passed over", said.output[0])
        index = ",question,answer\n" + "".join(f"{n},q{n},a{n}\n" for n in range(5))
        self.assertEqual(len(self.read(self.write("task.csv", index))[0]), 5)  # pandas leaves the first name blank

    def test_a_table_without_names(self) -> None:
        message = self.error(self.write("task.csv", "How deep?,9 metres\nHow wide?,3 metres\n"))
        self.assertIn("the first line is read as the names of the columns", message)

    def test_lists_as_python_writes_them(self) -> None:
        turns = str([{"role": "user", "content": "it's"}, {"role": "assistant", "content": "a"}])
        examples, _ = self.read(self.write("task.csv", f'messages\n"{turns.replace(chr(34), chr(34) * 2)}"\n'))
        self.assertEqual(examples[0]["question"], "it's")

    def test_the_nearest_columns_have_the_role_in_their_names(self) -> None:
        row = {"passage": "The well.", "name": "n", "questiontext": "q", "short_answers": ["a"]}
        self.assertIn("--data.columns question=questiontext,answer=short_answers;", self.error(self.rows(row)))

    def test_damaged_texts_are_counted(self) -> None:
        rows = numbered(3)
        rows[0]["answer"], rows[1]["answer"], rows[2]["question"] = "nan", "5 <b>m</b>&nbsp;deep", "GrÃ¶ÃŸe?"
        _, report = self.read(self.rows(*rows, {"question": "How deep is well 0?", "answer": "Ten."}))
        said = " ".join(report.notes)
        for part in ("nan, None", "HTML", "another encoding", "another answer"):
            self.assertIn(part, said)
        self.assertEqual(self.read(self.rows(*numbered(3)))[1].notes, {})
        self.assertIn("empty answer", self.error(self.rows({"question": "q", "answer": "\u3164"})))


class Documents(Files):
    def test_word_parts(self) -> None:
        def run(text: str) -> str:
            return f"<w:r><w:t>{text}</w:t></w:r>"

        def mark(kind: str) -> str:
            return f'<w:r><w:fldChar w:fldCharType="{kind}"/></w:r>'

        box = f"<w:sdt><w:sdtContent>{run('☒')}</w:sdtContent></w:sdt>"
        ruby = f"<w:r><w:ruby><w:rt>{run('kan')}</w:rt><w:rubyBase>{run('漢')}</w:rubyBase></w:ruby></w:r>"
        field = mark("begin") + mark("begin") + mark("separate") + run("inner") + mark("end")
        field += mark("separate") + run("result") + mark("end")
        link = '<w:hyperlink xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships" r:id="none">'
        text = self.docx(f"<w:p>{run('Done ')}{box}{ruby}{field}{link}{run('linked')}</w:hyperlink></w:p>")
        self.assertEqual(text, "Done ☒漢(kan)resultlinked")

    def test_columns_of_a_pdf_that_stand_close(self) -> None:
        # of these letters each is 0.556 em wide, and a blank 0.278: lines of 156 points, and 10.5 to the next column
        words = ["bond one hand bound upon haun", "hand one upon bound bond haun", "upon one hand bond bound haun"]
        width = (24 * 556 + 5 * 278) * 11 / 1000
        page = ""
        for column, text in enumerate(words):
            self.assertEqual(len(text), 29)
            page += "".join(at(50 + column * (width + 10.5), 700 - 13 * row, text) for row in range(6))
        flat = " ".join(read_file(self.pdf(page)).documents[0][1].split())
        self.assertEqual(flat, " ".join(text for text in words for _ in range(6)))

    def test_watermarks_are_left_out_and_counted(self) -> None:
        aslant = "BT /F1 60 Tf 0.7 0.7 -0.7 0.7 150 200 Tm (DRAFT) Tj ET\n"
        pages = [
            aslant + "".join(at(60, 700 - 14 * row, f"Well {n} row {row} is deep.") for row in range(40))
            for n in (1, 2)
        ]
        found = read_file(self.pdf(*pages))
        self.assertNotIn("DRAFT", found.documents[0][1])
        self.assertEqual(found.removed.total(), 10)
        self.assertIn("Well 2 row 20 is deep.\nWell 2 row 21 is deep.", found.documents[0][1])
        self.assertIn("DRAFT", read_file(self.pdf(pages[0])).documents[0][1])  # once, it may be a title

    def test_text_that_styles_hide(self) -> None:
        named = '<w:p><w:pPr><w:pStyle w:val="Secret"/></w:pPr>'
        path = self.folder / "styled.docx"
        from docx import Document
        from docx.enum.style import WD_STYLE_TYPE

        document = Document()
        hiding = document.styles.add_style("Hiding", WD_STYLE_TYPE.PARAGRAPH)
        hiding.font.hidden = True
        document.styles.add_style("Secret", WD_STYLE_TYPE.PARAGRAPH).base_style = hiding
        document.add_paragraph("hidden", style="Secret").add_run("shown").font.hidden = False
        document.save(str(path))
        self.assertEqual(read_file(path).documents[0][1], "shown", named)

    def test_comments_and_text_boxes_of_workbooks_are_counted(self) -> None:
        path = self.folder / "a.xlsx"
        path.write_bytes(workbook([["cell"]]))
        with zipfile.ZipFile(path, "a") as book:
            book.writestr("xl/comments1.xml", "<comments><t>my note</t></comments>")
            book.writestr("xl/drawings/drawing1.xml", "<wsDr><t>boxed</t></wsDr>")
        found = read_file(path)
        self.assertTrue(found.documents[0][1].endswith("\n\ncell"))
        self.assertEqual(found.removed, {"comments and text boxes of workbooks": 11})

    def test_embedded_objects_of_slides_are_counted(self) -> None:
        from pptx import Presentation
        from pptx.chart.data import CategoryChartData
        from pptx.enum.chart import XL_CHART_TYPE

        slides = Presentation()
        slide = slides.slides.add_slide(slides.slide_layouts[5])
        slide.shapes.title.text = "Depths"
        data = CategoryChartData()
        data.categories = ["east"]
        data.add_series("metres", (9,))
        slide.shapes.add_chart(XL_CHART_TYPE.PIE, 0, 0, 9999, 9999, data)
        slide.shapes.add_table(1, 1, 0, 0, 9999, 9999).table.cell(0, 0).text = "cell"
        slide.shapes.add_ole_object(io.BytesIO(b"sheet"), "Package", 0, 0)
        slides.save(str(self.folder / "a.pptx"))
        found = read_file(self.folder / "a.pptx")
        self.assertEqual(found.notes, ["1 embedded objects were left out"])
        self.assertEqual(found.documents[0][1], "# Depths\n\n| east\nmetres | 9\n\ncell")

    def test_pages_unfold_and_keep_their_sections(self) -> None:
        page = "<main><p>Well.</p><div role=tabpanel hidden>Second tab.</div><div class='expand-content' "
        page += "style='display:none'>Unfolded.</div><div style='display:none'>Never.</div></main>"
        text = self.text("a.html", page)
        self.assertEqual(text, "Well.\n\nSecond tab.\nUnfolded.")
        self.assertIn("6 characters that the page hides", " ".join(read_file(self.folder / "a.html").notes))
        markup = '<html xmlns="http://www.w3.org/1999/xhtml"><body><pre><![CDATA[a < b]]></pre></body></html>'
        self.assertIn("a < b", self.text("a.xhtml", markup))

    def test_encodings_by_their_other_names(self) -> None:
        for name, codec, text in (
            ("x-sjis", "cp932", "閉める①"),
            ("ks_c_5601-1987", "cp949", "똠방"),
            ("iso8859-1", "cp1252", "5 €"),
            ("big5", "big5hkscs", "嘅"),
        ):
            page = f'<meta charset="{name}">{text}'.encode(codec)
            self.assertTrue(decode(page, markup=True)[0].endswith(text), name)
        latex = "\\usepackage[latin1]{inputenc}\\begin{document}Größe\\end{document}".encode("latin-1")
        self.assertIn("Größe", self.text("a.tex", latex))

    def test_errors_and_tables_of_notebooks(self) -> None:
        outputs = [
            {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[31mE: too deep\x1b[0m"]},
            {"output_type": "display_data", "data": {"text/html": "<table><tr><td>9 m</td></tr></table>"}},
        ]
        cell = {"cell_type": "code", "source": "dig()", "outputs": outputs}
        text = self.text("a.ipynb", json.dumps({"cells": [cell]}))
        self.assertIn("E: too deep", text)
        self.assertIn("9 m", text)
