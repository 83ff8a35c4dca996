"""Every format gives what a person reads, nothing is lost unsaid, and no file harms the reading of another."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import shutil
import signal
import time
import unittest
import zipfile
import zlib
from pathlib import Path

from tests.support import temporary_directory
from utils.data.corpus.datatrove_pipeline import FolderReader
from utils.data.documents import ReadLimits, read_documents
from utils.data.extraction.cleaning import cleaned
from utils.data.extraction.extracted import NoTextError, visible_characters
from utils.data.extraction.formats import read_file
from utils.data.extraction.pages.html_text import extract_html
from utils.data.extraction.pdf.right_to_left import in_reading_order
from utils.data.extraction.pool import ExtractionPool
from utils.data.extraction.text_decoding import MARK, decode
from utils.exceptions import DataError

WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
WORD += ' xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"'
WORD += ' xmlns:v="urn:schemas-microsoft-com:vml"'


class Files(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_directory()
        self.addCleanup(shutil.rmtree, self.folder)

    def text(self, name: str, content: str | bytes) -> str:
        """The text that one file gives, read in this process."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_file(path).documents[0][1]

    def docx(self, body: str, **parts: str) -> str:
        """The text of a Word file with this body."""
        from docx import Document

        plain, path = self.folder / "plain.docx", self.folder / "made.docx"
        Document().save(str(plain))
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as made:
            for name in source.namelist():
                document = f"<w:document {WORD}><w:body>{body}</w:body></w:document>".encode()
                if name in parts:
                    continue
                made.writestr(name, document if name == "word/document.xml" else source.read(name))
            for name, content in parts.items():
                made.writestr(name, content)
        self.found = read_file(path)
        return self.found.documents[0][1]

    def pdf(self, *pages: str | bytes, name: str = "a.pdf", extra: str = "") -> Path:
        """A file whose pages have these contents; fonts /F1 Helvetica and /F2 with characters that it does not name."""
        odd = "/Type0 /Encoding /Identity-H /BaseFont /Odd /DescendantFonts [<< /Type /Font /Subtype /CIDFontType2 "
        odd += "/BaseFont /Odd /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) /Supplement 0 >> /DW 500 >>]"
        kids = " ".join(f"{5 + 2 * i} 0 R" for i in range(len(pages)))
        objects = [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
            f"<< /Type /Font /Subtype {odd} >>".encode(),
        ]
        for number, page in enumerate(pages):
            stream = zlib.compress(page if isinstance(page, bytes) else page.encode("cp1252"))
            fonts = "/MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R /F2 4 0 R >> >>"
            objects.append(f"<< /Type /Page /Parent 2 0 R {fonts} {extra} /Contents {6 + 2 * number} 0 R >>".encode())
            head = b"<< /Length %d /Filter /FlateDecode >>\nstream\n" % len(stream)
            objects.append(head + stream + b"\nendstream")
        body, offsets = b"%PDF-1.4\n", []
        for number, content in enumerate(objects, 1):
            offsets.append(len(body))
            body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
        table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
        size = len(objects) + 1
        start = len(body)
        body += b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\n" % (size, table, size)
        path = self.folder / name
        path.write_bytes(body + b"startxref\n%d\n%%%%EOF\n" % start)
        return path


def odt(body: str) -> bytes:
    """A file of LibreOffice Writer with this text; its style H is hidden."""
    spaces = " ".join(f'xmlns:{name}="urn:{name}"' for name in ("office", "text", "table", "style"))
    hidden = '<style:style style:name="H"><style:text-properties text:display="none"/></style:style>'
    content = f"<office:document-content {spaces}><office:automatic-styles>{hidden}</office:automatic-styles>"
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        text = f"<office:body><office:text>{body}</office:text></office:body></office:document-content>"
        archive.writestr("content.xml", content + text)
    return made.getvalue()


def at(x: float, y: float, text: str, size: int = 11) -> str:
    """PDF operators that show a text at a place."""
    return f"BT /F1 {size} Tf 1 0 0 1 {x} {y} Tm ({text}) Tj ET\n"


class Characters(Files):
    def test_c1_characters_are_windows_1252_and_controls_become_counted_marks(self) -> None:
        found = cleaned("10\x9620 bar\x85 \x93x\x94\nbell\x07")
        self.assertEqual((found.text, found.undecoded), ("10–20 bar… “x”\nbell" + MARK, 1))
        self.assertEqual(cleaned("one\x85two").text, "one\ntwo", "a lone NEL is a line end")

    def test_what_is_removed_adds_up(self) -> None:
        picture = "data:image/png;base64," + "iVBORw0KGgo" * 20
        for text in (
            "a\r\nb  \n\n\n\n\n\nc",
            "e\u0301x",
            f"![]({picture}) end",
            "soft\u00adhyphen",
            "\ud83d\ude00 \x00",
        ):
            found = cleaned(text)
            self.assertEqual(len(text), len(found.text) + found.removed.total(), repr(text))
        self.assertEqual(cleaned(f"![]({picture}) end").text, "![]() end")

    def test_declared_encodings_are_obeyed(self) -> None:
        page = '<html><head><meta charset="{}"></head><body><p>Größe 5 µm</p></body></html>'
        for declared, encoding in (("iso-8859-1", "latin-1"), ("windows-1252", "cp1252"), ("nobody", "cp1252")):
            self.assertEqual(self.text("a.html", page.format(declared).encode(encoding)), "Größe 5 µm")
        self.assertEqual(
            self.text("k.html", page.format("koi8-r").replace("Größe", "Вес").encode("koi8-r", "ignore")), "Вес 5 m"
        )
        xml = '<?xml version="1.0" encoding="iso-8859-15"?><p>5 €</p>'
        self.assertIn("5 €", self.text("a.xml", xml.encode("iso-8859-15")))
        self.assertEqual(self.text("a.txt", "Größe".encode("utf-16")), "Größe")
        self.assertEqual(decode("# coding: latin-1\nö".encode("latin-1"))[1], "cp1252")
        with self.assertRaisesRegex(NoTextError, "not UTF-8, at byte 2"):
            self.text("b.txt", "aö".encode("latin-1"))


class Pages(Files):
    def test_code_lists_definitions_headings_tables_and_formulas_stay_and_menus_go(self) -> None:
        page = """<html><head><title>no</title></head><body><nav><a href=/>Home</a></nav>
        <div id="cookie-banner">We use cookies. <button>OK</button></div>
        <div class="sidebar"><ul><li><a href=a>One</a></li><li><a href=b>Two</a></li></ul></div>
        <h2>Oiling</h2><p>Before   it.</p><ul><li>brass<ol><li>first</li></ol></li><li>steel</li></ul>
        <dl><dt>root</dt><dd>the superuser</dd></dl>
        <pre><code class="language-c"><a id=x></a>if (x)\n    y();</code></pre>
        <table><tr><th>Part</th><th>Torque</th></tr><tr><td rowspan=2>Valve</td><td>12</td></tr><tr><td>13</td></tr>
        <tr><td>Pump</td><td></td></tr></table>
        <p>Then <math><mfrac><mi>a</mi><mrow><mi>b</mi><mo>+</mo><mi>c</mi></mrow></mfrac></math>, 10<sup>3</sup>.</p>
        <footer>© ACME</footer></body></html>"""
        self.assertEqual(
            self.text("a.html", page),
            "## Oiling\n\nBefore it.\n\n- brass\n    1. first\n- steel\n\nroot\n    the superuser\n\n"
            "```c\nif (x)\n    y();\n```\n\nPart | Torque\nValve | 12\n | 13\nPump |\n\nThen a/(b+c), 10^3.",
        )

    def test_code_that_stands_line_by_line_in_a_table_keeps_its_blanks(self) -> None:
        row = '<tr><td class="blob-num" data-line-number="{0}"></td><td class="blob-code blob-code-inner">{1}</td></tr>'
        rows = row.format(1, "<span>def</span> f(x):") + row.format(2, "    return x")
        self.assertEqual(self.text("a.html", f"<table>{rows}</table>"), "```\ndef f(x):\n    return x\n```")
        boxes = "".join(f'<div class="react-file-line">{line}</div>' for line in ("if x:", "    y()"))
        self.assertEqual(self.text("b.html", f"<div><div>{boxes}</div></div>"), "```\nif x:\n    y()\n```")
        cells = row.format(1, "").replace('<td class="blob-code blob-code-inner"></td>', "<th>part</th><th>bar</th>")
        self.assertEqual(self.text("c.html", f"<table>{cells}</table>"), "part | bar")

    def test_a_page_of_nothing_but_a_menu_is_taken_whole(self) -> None:
        found = extract_html("<body><nav><a>One</a> <a>Two</a></nav></body>")
        self.assertEqual(found.documents[0][1], "One Two")
        self.assertEqual(found.removed.total(), 0)

    def test_a_chapter_that_is_called_menu_is_no_menu(self) -> None:
        page = '<body><h1>Tk</h1><div class="section" id="menu"><p>A menu opens below.</p></div><p>More.</p></body>'
        self.assertIn("A menu opens below.", extract_html(page).documents[0][1])

    def test_visible_characters_are_kept_or_counted_however_a_page_is_damaged(self) -> None:
        generator = random.Random(1)
        whole = (
            "<body><nav>Menu <a>x</a></nav><main><h1>T</h1><ul><li>a<li>b</ul><table><tr><td>c<td>d</table>"
            "<pre>e  f</pre><p>g <b>h</b> <math><mi>x</mi></math></main><div class=footer>i</div><p>j &amp; k"
        )
        for _ in range(300):
            at_, size = generator.randrange(len(whole)), generator.randrange(12)
            page = (
                whole[:at_]
                + generator.choice(["", "<", ">", "</div>", "<table>", "<li>", "&", "<pre>"])
                + whole[at_ + size :]
            )
            try:
                found = extract_html(page)
            except NoTextError:
                continue
            marks = str.maketrans("", "", "#`|-.0123456789;")
            text = found.documents[0][1].translate(marks)
            self.assertLessEqual(visible_characters(text), found.visible - found.removed.total(), page)
            self.assertGreaterEqual(visible_characters(text) + 25, found.visible - found.removed.total(), page)

    def test_elements_below_libxml2s_limit_are_not_lost(self) -> None:
        self.assertEqual(extract_html("<div>" * 5000 + "deep").documents[0][1], "deep")


class Words(Files):
    def test_changes_are_accepted_and_hidden_text_is_left_out_and_counted(self) -> None:
        run = "<w:r><w:t xml:space='preserve'>{}</w:t></w:r>"
        body = "<w:p>" + run.format("closed ") + "<w:del><w:r><w:delText>after </w:delText></w:r></w:del>"
        body += f"<w:ins>{run.format('before ')}</w:ins><w:moveTo>{run.format('it. ')}</w:moveTo>"
        body += f"<w:moveFrom>{run.format('it. ')}</w:moveFrom>"
        body += "<w:r><w:rPr><w:vanish/></w:rPr><w:t>secret</w:t></w:r></w:p>"
        self.assertEqual(self.docx(body), "closed before it.")
        self.assertEqual(self.found.removed, {"text that tracked changes delete": 8, "hidden text": 6})

    def test_fields_controls_boxes_and_formulas_are_read_once(self) -> None:
        run = "<w:r><w:t xml:space='preserve'>{}</w:t></w:r>"
        box = "<w:txbxContent><w:p>" + run.format("in a box") + "</w:p></w:txbxContent>"
        both = "xmlns:mc='http://schemas.openxmlformats.org/markup-compatibility/2006'"
        body = f"<w:p><w:fldSimple w:instr='X'>{run.format('42 bolts')}</w:fldSimple></w:p>"
        body += f"<w:sdt><w:sdtContent><w:p>{run.format('a control')}</w:p></w:sdtContent></w:sdt>"
        body += f"<w:p>{run.format('anchor')}<w:r><mc:AlternateContent {both}><mc:Choice><w:drawing>{box}</w:drawing>"
        body += f"</mc:Choice><mc:Fallback><w:pict><v:textbox>{box}</v:textbox></w:pict></mc:Fallback>"
        body += "</mc:AlternateContent></w:r></w:p>"
        part = "<m:{0}><m:r><m:t>{1}</m:t></m:r></m:{0}>"
        formula = f"<m:oMath><m:f>{part.format('num', 'a+b')}{part.format('den', '2')}</m:f></m:oMath>"
        body += f"<w:p>{run.format('x = ')}{formula}</w:p>"
        self.assertEqual(self.docx(body), "42 bolts\n\na control\n\nanchor\n\nin a box\n\nx = (a+b)/2")

    def test_a_table_that_says_to_span_billions_of_columns_is_read(self) -> None:
        cell = "<w:tc><w:tcPr><w:gridSpan w:val='2000000000'/></w:tcPr><w:p><w:r><w:t>wide</w:t></w:r></w:p></w:tc>"
        self.assertEqual(self.docx(f"<w:tbl><w:tr>{cell}{cell}</w:tr></w:tbl>"), "wide | wide")


class Pdfs(Files):
    def test_running_headers_footers_and_page_numbers_go_and_sentences_go_on(self) -> None:
        pages = []
        for number in range(1, 5):
            word = ("valve", "pump", "gauge", "drain")[number - 1]
            lines = [
                f"The {word} of page {number} begins here and",
                f"goes on for {word}s, which",
                f"ends as a {word} with",
            ]
            shown = "".join(at(72, 700 - 14 * i, line) for i, line in enumerate(lines))
            pages.append(at(72, 760, "ACME - Confidential") + shown + at(72, 40, f"Page {number} of 4"))
        found = read_file(self.pdf(*pages))
        text = found.documents[0][1]
        self.assertEqual([text.count("Confidential"), text.count("of 4"), text.count("begins here")], [0, 0, 4])
        self.assertGreater(found.removed["running headers and footers"], 0)

    def test_columns_are_read_one_after_the_other(self) -> None:
        left = [f"left column line {i} of the first column" for i in range(8)]
        right = [f"right column line {i} of the second one" for i in range(8)]
        page = at(72, 740, "A title that runs over both of the columns of this page, from left to right", 12)
        for i in range(8):
            page += at(72, 700 - 13 * i, left[i], 9) + at(320, 700 - 13 * i, right[i], 9)
        text = read_file(self.pdf(page)).documents[0][1]
        self.assertLess(text.index(left[7]), text.index(right[0]), text)
        # on the last page the second column ends earlier, and the first goes on with a new paragraph
        for i in range(6):
            page += at(72, 580 - 13 * i, f"left again {i}: the second paragraph of it", 9)
        text = read_file(self.pdf(page)).documents[0][1]
        self.assertLess(text.index("left again 5"), text.index(right[0]), text)
        page += at(72, 480, "A line over the whole of the page, from its left border to the right one", 12)
        text = read_file(self.pdf(page)).documents[0][1]
        self.assertLess(text.index(right[7]), text.index("left again 0"), text)

    def test_empty_cells_of_a_table_stay(self) -> None:
        rows = [
            ("Part", "Interval", "Torque"),
            ("Valve A", "2 weeks", "12 Nm"),
            ("Valve B", "1 year", ""),
            ("Pump", "", "40 Nm"),
        ]
        page = "".join(
            at(x, 740 - 16 * y, cell)
            for y, row in enumerate(rows)
            for x, cell in zip((72, 200, 330), row, strict=True)
            if cell
        )
        text = read_file(self.pdf(page)).documents[0][1]
        self.assertEqual(
            text, "Part | Interval | Torque\nValve A | 2 weeks | 12 Nm\nValve B | 1 year |\nPump |  | 40 Nm"
        )

    def test_hyphens_at_line_ends_are_as_the_document_writes_them(self) -> None:
        lines = [
            "The main-",
            "tenance of the well-",
            "known pump, a state-of-the-",
            "art one, see form A-",
            "12b. Its x-",
            "ray of 10-",
            "20 bar, Graeco-",
            "Roman,",
        ]
        lines += ["is long-", "term. A long-term plan is well-known."]
        text = read_file(self.pdf("".join(at(72, 740 - 14 * i, line) for i, line in enumerate(lines)))).documents[0][1]
        for expected in (
            "maintenance",
            "well-known pump",
            "state-of-the-art",
            "A-12b",
            "x-ray",
            "long-term. A",
            "10-20",
            "Graeco-Roman",
        ):
            self.assertIn(expected, text)

    def test_undecodable_characters_are_marked_and_counted_and_many_of_them_are_refused(self) -> None:
        path = self.pdf(
            at(72, 740, "Many words that can be read well enough. " * 2) + "BT /F2 11 Tf 72 700 Td <00010002> Tj ET"
        )
        found = read_file(path)
        self.assertEqual((found.undecoded, found.documents[0][1].count(MARK)), (2, 2))
        with self.assertRaisesRegex(NoTextError, "4 of 4 characters could not be decoded"):
            read_file(self.pdf("BT /F2 11 Tf 72 700 Td <0001000200030004> Tj ET"))

    def test_pages_without_text_are_counted(self) -> None:
        found = read_file(self.pdf(at(72, 740, "The cover."), "0 0 600 700 re f", "0 0 600 700 re f"))
        self.assertEqual((found.pages, found.pages_without_text), (3, 2))
        self.assertRegex(found.notes[0], "2 of 3 pages have no text layer")

    def test_aes_with_an_empty_password_is_read(self) -> None:
        from pypdf import PdfWriter

        path = self.pdf(at(72, 740, "Not so secret."))
        for password, expected in (("", "Not so secret."), ("word", "")):
            writer = PdfWriter(clone_from=path)
            writer.encrypt(password, owner_password="owner", algorithm="AES-256")
            writer.write(self.folder / "b.pdf")
            if expected:
                self.assertEqual(read_file(self.folder / "b.pdf").documents[0][1], expected)
            else:
                with self.assertRaisesRegex(NoTextError, "encrypted"):
                    read_file(self.folder / "b.pdf")

    def test_right_to_left_lines_are_turned_where_the_page_shows_them_as_they_are_read(self) -> None:
        logical = "هذا نص عربي قصير في الوسط"
        self.assertEqual(in_reading_order(logical[::-1]), logical)
        self.assertEqual(in_reading_order(logical), logical)
        self.assertEqual(in_reading_order("םולש 2024"), "2024 שלום")


class OtherFormats(Files):
    def test_each_gives_its_text(self) -> None:
        from pptx import Presentation

        notebook = {
            "cells": [{"cell_type": "code", "source": ["x = 1\n"], "outputs": [{"text": "out"}]}],
            "metadata": {},
        }
        self.assertEqual(self.text("a.ipynb", json.dumps(notebook)), "```\nx = 1\n\n```\n\n```\nout\n```")
        mail = "Subject: =?utf-8?q?Pr=C3=BCfung?=\nContent-Type: text/html; charset=utf-8\n\n<p>Größe</p>"
        self.assertEqual(self.text("a.eml", mail), "Subject: Prüfung\n\nGröße")
        self.assertEqual(self.text("a.rst", "T\n=\n\n.. hidden\n\n*oil* it\n"), "# T\n\noil it")
        self.assertEqual(self.text("b.rst", "T\n=\n\n.. automodule:: x\n\n:func:`y`"), "# T\n\nx\n\ny")
        tex = r"\section{Oil} $x^2$ \emph{now} \unknown{kept} % no"
        self.assertEqual(self.text("a.tex", tex).split(), ["##", "Oil", "$x^2$", "now", "\\unknown{kept}"])
        self.assertEqual(self.text("a.py", "x = 1\n"), "x = 1")
        slides = Presentation()
        slide = slides.slides.add_slide(slides.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = "Pump", "oil"
        slides.save(str(self.folder / "a.pptx"))
        self.assertEqual(read_file(self.folder / "a.pptx").documents[0][1], "# Pump\n\noil")
        container = '<container><rootfiles><rootfile full-path="o/p.opf"/></rootfiles></container>'
        package = '<package><manifest><item id="b" href="b.xhtml" media-type="application/xhtml+xml"/><item id="a" '
        package += 'href="a.xhtml" media-type="application/xhtml+xml"/></manifest><spine><itemref idref="b"/>'
        package += '<itemref idref="a"/></spine></package>'
        with zipfile.ZipFile(self.folder / "a.epub", "w") as book:
            book.writestr("META-INF/container.xml", container)
            book.writestr("o/p.opf", package)
            book.writestr("o/a.xhtml", "<html><body><p>second</p></body></html>")
            book.writestr("o/b.xhtml", "<html><body><h1>first</h1></body></html>")
        self.assertEqual(read_file(self.folder / "a.epub").documents[0][1], "# first\n\nsecond")

    def test_a_text_of_libreoffice_is_read_with_its_changes_accepted(self) -> None:
        body = "<text:tracked-changes><text:p>deleted</text:p></text:tracked-changes>"
        body += '<text:h text:outline-level="2">Oil</text:h><text:p>Two<text:s text:c="3"/>blanks, a note.<text:note>'
        body += "<text:note-citation>1</text:note-citation><text:note-body><text:p>Here it is.</text:p>"
        body += "</text:note-body></text:note> Then"
        body += "<office:annotation><text:p>said</text:p></office:annotation> on.</text:p>"
        body += "<text:list><text:list-item><text:p>first</text:p></text:list-item></text:list><table:table>"
        body += "<table:table-row><table:table-cell><text:p>Valve</text:p></table:table-cell><table:table-cell/>"
        body += "<table:table-cell><text:p>12</text:p></table:table-cell></table:table-row></table:table>"
        body += '<text:p text:style-name="H">unseen</text:p>'
        path = self.folder / "a.odt"
        path.write_bytes(odt(body))
        found = read_file(path)
        text = "## Oil\n\nTwo blanks, a note. (Here it is.) Then on.\n\n- first\n\nValve |  | 12"
        self.assertEqual(found.documents[0][1], text)
        self.assertEqual(
            found.removed, {"text that tracked changes delete": 7, "comments": 4, "hidden text": 6}, found.removed
        )
        self.assertEqual(found.visible, found.removed.total() + visible_characters(text.replace("|", "")) - 3)

    def test_each_message_of_a_mailbox_is_a_document(self) -> None:
        path = self.folder / "a.mbox"
        head = "From a@example.org Mon Jan  1 00:00:00 2024\nSubject: {}\n"
        files = (
            "Content-Type: multipart/mixed; boundary=B\n\n--B\nContent-Type: text/html\n\n<p>Two <b>m</b></p>\n--B\n"
        )
        files += "Content-Type: application/pdf\nContent-Disposition: attachment; filename=x.pdf\n\nxx\n--B--\n\n"
        path.write_text(f"{head.format('Oil')}\nChange it.\n\n{head.format('Next')}{files}")
        found = read_file(path)
        self.assertEqual(found.documents, [("1", "Subject: Oil\n\nChange it."), ("2", "Subject: Next\n\nTwo m")])
        self.assertEqual(found.notes, ["1 attachments were left out"])
        with self.assertRaisesRegex(NoTextError, "no message"):
            self.text("b.mbox", "nothing of the kind")

    def test_what_subtitles_say_is_read_and_their_times_are_counted(self) -> None:
        srt = "1\r\n00:00:01,000 --> 00:00:02,500\r\n<i>Close it.</i>\r\n\r\n2\r\n00:00:03,000 --> 00:00:04,000\r\n"
        self.assertEqual(self.text("a.srt", srt + "{\\an8}Then 5 &lt; 7\r\n\r\nbars."), "Close it.\nThen 5 < 7\nbars.")
        vtt = (
            "WEBVTT\n\nNOTE unsaid\n\nintro\n00:01.000 --> 00:02.000 align:start\n<v.loud Ann Lee>We <00:01.500><c>oil"
        )
        vtt += "</c>\n\n00:02.000 --> 00:03.000\nAnn Lee: We oil\nit\n"
        self.assertEqual(self.text("a.vtt", vtt), "Ann Lee: We oil\nit")
        found = read_file(self.folder / "a.vtt")
        self.assertEqual(found.visible, len("AnnLee:Weoilit") + found.removed.total())
        self.assertEqual(found.removed["repeated lines of subtitles"], 12)


class SideBySide(Files):
    def read(self, **limits: object) -> tuple[dict[str, str], object]:
        cache = self.folder.parent / f"{self.folder.name}-cache"
        self.addCleanup(shutil.rmtree, cache, ignore_errors=True)
        dataset, report = read_documents([str(self.folder)], cache_dir=cache, limits=ReadLimits(**limits))
        return {row["id"]: row["text"] for row in dataset}, report

    def test_hostile_files_are_unreadable_files_like_others(self) -> None:
        self.pdf(b"BT /F1 12 Tf 72 720 Td " + b"(a) Tj " * 6_000_000 + b"ET", name="slow.pdf")
        (self.folder / "a.html").write_text("<!--" * 300_000)
        (self.folder / "b.html").write_text("<p>fine</p>")
        (self.folder / "c.csv").write_text(",".join(f"c{i}" for i in range(100_000)) + "\n" + "x," * 99_999 + "x\n")
        (self.folder / "latin.txt").write_bytes(b"caf\xe9")
        (self.folder / "package.json").write_text('{"name": "x"}')
        (self.folder / "z.txt").write_text("the last")
        with self.assertLogs("utils.data.corpus.read_report", "WARNING"):
            texts, report = self.read(file_seconds=2)
        self.assertEqual(texts, {"b.html": "fine", "z.txt": "the last"})
        self.assertEqual(report.dropped["takes too long"], 1)
        self.assertTrue(any("slow.pdf: reading it takes more than 2 seconds" in line for line in report.unreadable))
        self.assertTrue(any("latin.txt:1: not UTF-8" in line for line in report.unreadable))
        self.assertTrue(any("package.json" in line for line in report.unreadable))

    def test_on_unreadable_stop_is_an_error_with_every_file(self) -> None:
        for name in ("a.txt", "b.txt"):
            (self.folder / name).write_bytes(b"caf\xe9")
        with self.assertRaisesRegex(DataError, "(?s)a.txt:1: not UTF-8.*b.txt:1: not UTF-8"):
            self.read(on_unreadable="stop")

    def test_a_child_that_is_killed_costs_its_file_alone(self) -> None:
        path = self.pdf(b"BT /F1 12 Tf 72 720 Td " + b"(a) Tj " * 3_000_000 + b"ET")
        (self.folder / "b.html").write_text("<p>fine</p>")
        with ExtractionPool(1, seconds=60, memory_bytes=2**31) as pool:
            slow, fine = pool.submit(path), pool.submit(self.folder / "b.html")
            time.sleep(0.2)
            os.kill(pool._children[0].process.pid, signal.SIGKILL)
            with self.assertRaisesRegex(NoTextError, "killed"):
                pool.result(slow)
            self.assertEqual(pool.result(fine).documents[0][1], "fine")
            child = pool._children[0].process
        self.assertIsNotNone(child.returncode, "no child outlives its pool")

    def test_a_file_that_needs_more_memory_than_allowed_is_unreadable(self) -> None:
        (self.folder / "a.ipynb").write_text('{"cells": [' + "[]," * 6_000_000 + "[]]}")
        (self.folder / "b.html").write_text("<p>fine</p>")
        texts, report = self.read(file_memory_mb=256)
        self.assertEqual((texts, list(report.dropped)), ({"b.html": "fine"}, ["needs too much memory"]))

    def test_what_is_read_does_not_depend_on_the_number_of_processes(self) -> None:
        for number in range(12):
            (self.folder / f"{number}.html").write_text(f"<p>text {number}</p>" * (number * 50 + 1))
        self.assertEqual(self.read(workers=1), self.read(workers=3))

    def test_characters_and_rows_add_up(self) -> None:
        (self.folder / "a.txt").write_text("a  \r\nb\n\n\n\n\n\nc")
        (self.folder / "b.txt").write_text("a\nb\n\n\nc")
        (self.folder / "c.jsonl").write_text(
            '{"text": "", "content": "x ", "title": "t"}\nbroken\n{"text": 1}\n{"n": 1}\n'
        )
        (self.folder / "d.html").write_text("<nav>menu</nav><p>body of the page</p>")
        with self.assertLogs("utils.data.corpus.read_report", "WARNING"):
            _, report = self.read()
        total = report.characters + sum(report.cleaned.values()) + sum(report.dropped_characters.values())
        self.assertEqual(report.characters_extracted, total)
        self.assertEqual((report.rows, report.columns_not_used), (3, {"text": 1, "title": 1}))
        dropped = [report.dropped[reason] for reason in ("malformed rows", "rows without a text column")]
        self.assertEqual(dropped, [2, 1], "each line of the table is used or dropped for one reason")


class Mutations(Files):
    """Damaged files of every format: each is a document or is named, and the characters add up."""

    EACH = 160 if os.environ.get("FAULT_TESTS") == "long" else 6

    def valid(self) -> dict[str, bytes]:
        """One valid file of each format that is read as one document."""
        from docx import Document
        from pptx import Presentation

        document = Document()
        document.add_heading("Oiling the pump")
        document.add_paragraph("The operator closes the valve.")
        document.add_table(rows=2, cols=2).cell(0, 0).text = "Torque"
        document.save(str(self.folder / "v.docx"))
        slides = Presentation()
        slides.slides.add_slide(slides.slide_layouts[1]).shapes.title.text = "Pump"
        slides.save(str(self.folder / "v.pptx"))
        with zipfile.ZipFile(self.folder / "v.epub", "w") as book:
            book.writestr("META-INF/container.xml", '<c><rootfile full-path="p.opf"/></c>')
            book.writestr("p.opf", '<p><item id="a" href="a.html" media-type="text/html"/><itemref idref="a"/></p>')
            book.writestr("a.html", "<h1>Chapter</h1><p>Text of the book.</p>")
        self.pdf(at(72, 700, "A page with words."), at(72, 700, "Another page."), name="v.pdf")
        texts = {
            ".html": "<body><nav>Menu</nav><h1>Title</h1><ul><li>a<li>b</ul><table><tr><td>c<td>d</table><pre>e</pre>",
            ".ipynb": json.dumps({"cells": [{"cell_type": "markdown", "source": ["# T"]}], "metadata": {}}),
            ".eml": "Subject: Pump\nContent-Type: text/plain; charset=utf-8\n\nOil it.\n",
            ".rst": "Title\n=====\n\n* one\n* two\n\n.. note:: care\n",
            ".tex": r"\section{Oil} $x^2$ \begin{itemize}\item a\end{itemize} \emph{b}",
            ".md": "# Title\n\n- a\n\n```\ncode\n```\n",
            ".srt": "1\n00:00:01,000 --> 00:00:02,000\nOil it.\n\n2\n00:00:03,000 --> 00:00:04,000\nNow.\n",
        }
        files = {path.suffix: path.read_bytes() for path in self.folder.iterdir()}
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        files[".odt"] = odt("<text:h>Oil</text:h><text:p>The pump.</text:p>")
        return files | {suffix: text.encode() for suffix, text in texts.items()}

    def test_each_is_a_document_or_is_named_and_the_sums_hold(self) -> None:
        generator, written = random.Random(7), 0
        for suffix, content in self.valid().items():
            for number in range(self.EACH):
                damaged = bytearray(content)
                for _ in range(generator.randint(1, 6)):
                    at_ = generator.randrange(len(damaged) or 1)
                    how = generator.randrange(4)
                    if how == 0:
                        damaged[at_ : at_ + generator.randint(1, 40)] = b""
                    elif how == 1:
                        damaged[at_:at_] = generator.randbytes(generator.randint(1, 8))
                    elif how == 2:
                        damaged[at_:at_] = damaged[at_ : at_ + 30]
                    elif damaged:
                        damaged[at_ % len(damaged)] = generator.randrange(256)
                (self.folder / f"{number}{suffix}").write_bytes(bytes(damaged))
                written += 1
        scratch = temporary_directory()
        self.addCleanup(shutil.rmtree, scratch)
        logging.disable(logging.WARNING)
        self.addCleanup(logging.disable, logging.NOTSET)
        dataset, report = read_documents([str(self.folder)], cache_dir=scratch, limits=ReadLimits(file_seconds=20))
        self.assertEqual(report.files, written)
        self.assertEqual(len(dataset) + sum(report.dropped.values()), written)
        total = report.characters + sum(report.cleaned.values()) + sum(report.dropped_characters.values())
        self.assertEqual(report.characters_extracted, total)
        self.assertEqual(sum(map(len, dataset["text"])), report.characters)
        self.assertGreater(len(dataset), 0.2 * written)


class Pipelines(Files):
    def test_what_datatrove_writes_is_read_as_the_folder_itself(self) -> None:
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline.writers import ParquetWriter

        for number in range(5):
            (self.folder / f"{number}.html").write_text(f"<h1>Title {number}</h1><p>Body.</p>")
        (self.folder / "bad.txt").write_bytes(b"caf\xe9")
        scratch = temporary_directory()
        self.addCleanup(shutil.rmtree, scratch)
        steps = [FolderReader(str(self.folder)), ParquetWriter(str(scratch / "extracted"))]
        logs = str(scratch / "logs")
        LocalPipelineExecutor(steps, tasks=2, workers=1, logging_dir=logs).run()
        with self.assertLogs("utils.data.corpus.read_report", "WARNING"):
            direct, _ = read_documents([str(self.folder)], cache_dir=scratch / "one")
        written, _ = read_documents([str(scratch / "extracted")], cache_dir=scratch / "two")
        self.assertEqual(sorted(zip(*written[:].values(), strict=True)), sorted(zip(*direct[:].values(), strict=True)))
        self.assertEqual(len(direct), 5)


if __name__ == "__main__":
    unittest.main()
