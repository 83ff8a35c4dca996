"""What people report of documents in public: words in parts that a reader of the file sees and a program overlooks."""

from __future__ import annotations

import base64
import json
import unittest
import zipfile

from tests.support import Workspace
from tests.test_data_extraction import WORD, Files
from utils.artifacts import files
from utils.data.extraction.formats import read_file

DIAGRAM = "http://schemas.openxmlformats.org/drawingml/2006/diagram"
DRAWING = "http://schemas.openxmlformats.org/drawingml/2006/main"
RELATED = "http://schemas.openxmlformats.org/package/2006/relationships"
RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
FRAME = (
    '<p:graphicFrame xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main" '
    f'xmlns:a="{DRAWING}" xmlns:r="{RELATIONS}"><p:nvGraphicFramePr><p:cNvPr id="9" name="D"/><p:cNvGraphicFramePr/>'
    '<p:nvPr/></p:nvGraphicFramePr><p:xfrm><a:off x="0" y="0"/><a:ext cx="1" cy="1"/></p:xfrm><a:graphic>'
    f'<a:graphicData uri="{DIAGRAM}"><dgm:relIds xmlns:dgm="{DIAGRAM}" r:dm="rId90"/></a:graphicData></a:graphic>'
    "</p:graphicFrame>"
)
FORWARD = """Subject: Look
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=B

--B
Content-Type: text/plain; charset=windows-1252
Content-Transfer-Encoding: quoted-printable

Price is 5 =80 =96 see below.
--B
Content-Type: image/png
Content-Disposition: inline; filename=a.png

x
--B
Content-Type: text/plain; charset=utf-8

Sent from my phone.
--B
Content-Type: message/rfc822

From: c@example.org
Subject: The original

Close valve 7.
--B
Content-Type: text/plain; name=notes.txt
Content-Disposition: attachment; filename=notes.txt

attached
--B--
"""
SPHINX = """Pump
====

See :ref:`the guide <guide>`, :func:`~pump.core.start` and |version|.

.. function:: start(speed, *, wait=True)

   Start *it*.

   .. versionadded:: 3.2
      The wait argument.

.. toctree::

   intro

.. code-block:: python
   :linenos:

   start(1)

.. glossary::

   valve
      Opens.
"""
LATEX = r"""\documentclass{article}\newcommand{\be}{\begin{equation}}\newcommand{\ee}{\end{equation}}
\newcommand{\pump}{rotary pump}\newcommand{\unit}[2][bar]{#2\,#1}\def\half{one half}
\begin{document} The \pump{} runs at \unit{5} or \unit[psi]{70}, \half. See \href{https://x.org/a%20b}{the page}.
\be a = b \ee
\todo{Check}{this}. A brace } too many.
\begin{figure}\caption{A picture.}\end{figure}\end{document}"""


class Overlooked(Files):
    def test_a_forwarded_message_and_a_body_in_parts_are_read(self) -> None:
        text = self.text("a.eml", FORWARD)
        self.assertEqual(
            text,
            "Subject: Look\n\nPrice is 5 € – see below.\n\nSent from my phone.\n\nFrom: c@example.org\n"
            "Subject: The original\n\nClose valve 7.",
        )
        self.assertEqual(read_file(self.folder / "a.eml").notes, ["2 attachments were left out"])

    def test_words_of_charts_and_diagrams_are_read(self) -> None:
        from pptx import Presentation
        from pptx.chart.data import CategoryChartData
        from pptx.enum.chart import XL_CHART_TYPE

        slides, data = Presentation(), CategoryChartData()
        slide = slides.slides.add_slide(slides.slide_layouts[6])
        data.categories = ["East", "West"]
        data.add_series("Sales", (19.2, 0.1 + 0.2))
        chart = slide.shapes.add_chart(XL_CHART_TYPE.COLUMN_CLUSTERED, 0, 0, 9, 9, data).chart
        chart.has_title = True
        chart.chart_title.text_frame.text = "By region"
        slides.save(str(self.folder / "plain.pptx"))
        boxes = "".join(
            f'<dgm:pt modelId="{n}"><dgm:t><a:bodyPr/><a:p><a:r><a:t>{text}</a:t></a:r></a:p></dgm:t></dgm:pt>'
            for n, text in enumerate(("plan", "do"))
        )
        model = (
            f'<dgm:dataModel xmlns:dgm="{DIAGRAM}" xmlns:a="{DRAWING}"><dgm:ptLst>{boxes}</dgm:ptLst></dgm:dataModel>'
        )
        relation = f'<Relationship Id="rId90" Type="{RELATIONS}/diagramData" Target="../diagrams/data1.xml"/>'
        changed = {"ppt/slides/slide1.xml": (b"</p:spTree>", FRAME)}
        changed["ppt/slides/_rels/slide1.xml.rels"] = (b"</Relationships>", relation)
        with (
            zipfile.ZipFile(self.folder / "plain.pptx") as plain,
            zipfile.ZipFile(self.folder / "a.pptx", "w") as made,
        ):
            for name in plain.namelist():
                end, more = changed.get(name, (b"", ""))
                content = plain.read(name)
                made.writestr(name, content.replace(end, more.encode() + end) if end else content)
            made.writestr("ppt/diagrams/data1.xml", model)
        found = read_file(self.folder / "a.pptx")
        self.assertEqual(found.documents[0][1], "By region\n | East | West\nSales | 19.2 | 0.3\n\nplan\ndo")
        self.assertEqual(found.notes, [])

    def test_numbers_of_word_are_those_that_it_shows(self) -> None:
        def level(at: int, form: str, text: str, more: str = "") -> str:
            inside = f'<w:start w:val="1"/><w:numFmt w:val="{form}"/>{more}<w:lvlText w:val="{text}"/>'
            return f'<w:lvl w:ilvl="{at}">{inside}</w:lvl>'

        def numbered(number: int, at: int, text: str, style: str = "") -> str:
            style = f'<w:pStyle w:val="{style}"/>' if style else ""
            place = f'<w:numPr><w:ilvl w:val="{at}"/><w:numId w:val="{number}"/></w:numPr>'
            return f"<w:p><w:pPr>{style}{place}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"

        steps = level(0, "decimal", "%1.") + level(1, "lowerLetter", "%2)")
        heads = level(0, "upperRoman", "Article %1") + level(1, "decimal", "%1.%2", "<w:isLgl/>")
        lists = "".join(
            f'<w:abstractNum w:abstractNumId="{n}">{one}</w:abstractNum>'
            for n, one in enumerate((steps, heads, level(0, "bullet", "o")))
        )
        anew = '<w:lvlOverride w:ilvl="0"><w:startOverride w:val="1"/></w:lvlOverride>'
        for number, (definition, more) in enumerate(((0, ""), (1, ""), (2, ""), (0, anew)), 1):
            lists += f'<w:num w:numId="{number}"><w:abstractNumId w:val="{definition}"/>{more}</w:num>'
        between = "<w:p><w:r><w:t>A remark.</w:t></w:r></w:p>"
        body = numbered(2, 0, "Scope", "Heading1") + numbered(2, 1, "Pumps", "Heading2") + numbered(1, 0, "Open.")
        body += numbered(1, 1, "Left.") + numbered(1, 1, "Right.") + between + numbered(1, 0, "Close.")
        body += between + numbered(4, 0, "Anew.") + between + numbered(3, 0, "Dot.") + numbered(2, 0, "End", "Heading1")
        text = self.docx(body, **{"word/numbering.xml": f"<w:numbering {WORD}>{lists}</w:numbering>"})
        self.assertEqual(
            text,
            "# Article I Scope\n\n## 1.1 Pumps\n\n1. Open.\n    a) Left.\n    b) Right.\n\nA remark.\n\n2. Close.\n\n"
            "A remark.\n\n1. Anew.\n\nA remark.\n\n- Dot.\n\n# Article II End",
        )
        self.assertEqual(+self.found.removed, {})

    def test_sphinx_markup_is_read_as_its_page_shows_it(self) -> None:
        self.assertEqual(
            self.text("a.rst", SPHINX),
            "# Pump\n\nSee the guide, start and |version|.\n\nstart(speed, *, wait=True)\n\nStart it.\n\n"
            "Added in version 3.2 The wait argument.\n\n```\nstart(1)\n```\n\nvalve\n    Opens.",
        )
        lost = "T\n=\n\n.. list-table:: Sizes\n\n   words that count\n\nEnd.\n"
        self.assertEqual(self.text("b.rst", lost), lost.strip())
        self.assertEqual(len(read_file(self.folder / "b.rst").notes), 1)

    def test_macros_that_a_file_defines_and_links_do_not_end_its_reading(self) -> None:
        text = " ".join(self.text("a.tex", LATEX).split())
        self.assertEqual(
            text,
            "The rotary pump runs at 5 bar or 70 psi, one half. See the page. \\begin{equation}a = b \\end{equation} "
            "\\todo{Check}{this}. A brace too many. A picture.",
        )
        self.assertEqual(self.text("b.tex", r"Words \sqrt"), r"Words \sqrt")
        endless = r"\newcommand{\a}{\b\b}\newcommand{\b}{\a\a} \a word"
        self.assertIn("word", self.text("c.tex", endless))

    def test_utf_16_without_a_mark_is_known_by_its_zeros(self) -> None:
        for encoding in ("utf-16-le", "utf-16-be"):
            self.assertEqual(self.text("a.txt", "Größe des Ventils".encode(encoding)), "Größe des Ventils")

    def test_lists_of_pages_count_as_they_say_and_drawn_words_are_counted(self) -> None:
        page = '<main><ol type="a"><li>one<li>two</ol><ol type="I" start="4"><li>four</ol><ul class="task-list"><li>'
        page += '<input type="checkbox" checked>done<li><input type="checkbox">open</ul><svg><text>In it</text></svg>'
        text = self.text("a.html", page + "<textarea>typed</textarea></main>")
        self.assertEqual(text, "a. one\nb. two\n\nIV. four\n\n- [x] done\n- [ ] open")
        found = read_file(self.folder / "a.html")
        self.assertEqual(found.removed, {"words in drawings and form fields of pages": 9})

    def test_headings_and_pictures_of_notebooks(self) -> None:
        shown = {"data": {"image/png": "x", "text/plain": ["<Figure size 640x480>"]}, "output_type": "display_data"}
        value = {"data": {"text/plain": ["<Table of 2>"]}, "output_type": "execute_result"}
        cells = [
            {"cell_type": "heading", "level": 2, "source": ["Oil"]},
            {"cell_type": "code", "input": "x", "outputs": [shown, value]},
        ]
        text = self.text("a.ipynb", json.dumps({"nbformat": 3, "worksheets": [{"cells": cells}]}))
        self.assertEqual(text, "## Oil\n\n```\nx\n```\n\n```\n<Table of 2>\n```")
        self.assertEqual(read_file(self.folder / "a.ipynb").notes, ["1 outputs that are no text were left out"])

    def test_formulas_without_a_value_are_counted(self) -> None:
        main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
        kinds = "application/vnd.openxmlformats-officedocument.spreadsheetml"
        parts = {
            "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            '<Default Extension="xml" ContentType="application/xml"/><Default Extension="rels" ContentType='
            '"application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
            f'ContentType="{kinds}.sheet.main+xml"/></Types>',
            "_rels/.rels": f'<Relationships xmlns="{RELATED}"><Relationship Id="a" Type="{RELATIONS}/officeDocument" '
            'Target="xl/workbook.xml"/></Relationships>',
            "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{RELATIONS}"><sheets><sheet name="S" sheetId="1" '
            'r:id="b"/></sheets></workbook>',
            "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{RELATED}"><Relationship Id="b" '
            f'Type="{RELATIONS}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
            "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData><row r="1"><c r="A1"><v>2</v></c>'
            '<c r="B1"><f>A1*2</f><v>4</v></c><c r="C1"><f>A1*3</f></c><c r="D1"><f>A1</f><v/></c></row></sheetData>'
            "</worksheet>",
        }
        with zipfile.ZipFile(self.folder / "a.xlsx", "w") as made:
            for name, content in parts.items():
                made.writestr(name, content)
        found = read_file(self.folder / "a.xlsx")
        self.assertEqual(found.documents[0][1], "# S\n\n2 | 4")
        self.assertRegex(found.notes[0], "^2 formulas have no value")

    def test_numbers_of_a_workbook_are_those_that_it_shows(self) -> None:
        from utils.data.extraction.office_text import _cell

        self.assertEqual([_cell(value) for value in (1.1 + 2.2, 5.0, 1e16, 0.25)], ["3.3", "5", "1e+16", "0.25"])


class Typed(unittest.TestCase):
    def test_prepare_data_reads_them_from_a_folder(self) -> None:
        place = Workspace()
        folder = place.root / "documents"
        folder.mkdir()
        for name, text in (("a.eml", FORWARD), ("b.rst", SPHINX), ("c.tex", LATEX)):
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "d.txt").write_bytes("Größe des Ventils".encode("utf-16-le"))
        page = "<p>" + base64.b64encode(b"words of a page").decode() + "</p><svg><text>drawn</text></svg>"
        (folder / "e.html").write_text(page, encoding="utf-8")
        done = place.run("prepare_data", "--data.corpus", str(folder), "--data.task", "none")
        self.assertEqual(done.returncode, 0, done.stderr)
        (run,) = (place.data / "prepared").glob("*/manifest.json")
        read = files.read_manifest(run.parent)["counts"]["documents"]["read"]
        self.assertIn("words in drawings and form fields of pages", str(read))
        self.assertIn("words in drawings and form fields of pages", done.stdout)


if __name__ == "__main__":
    unittest.main()
