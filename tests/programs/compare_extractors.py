"""Extractors compared on documents whose text is known: word recall, precision and order, ours beside others'.

Writes documents from the text files of a folder (headings, lists, tables, footnotes, code; one and two columns, with
running headers) as docx, html, epub and pdf, by pandoc and LibreOffice; reads each with ours and, in another
environment's interpreter, with pypdf, pdfminer.six, markitdown and trafilatura. Needs `pandoc` and `soffice`.

    python -m tests.programs.compare_extractors TEXTS.jsonl WORK_FOLDER OTHER_PYTHON
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from utils.evaluation.metrics.text_overlap import longest_common_subsequence

DOCUMENTS, CHARACTERS = 8, 9000
HEADER, FOOTER = "Handbook of the Test, revision seven", "Printed copies are not controlled"
OTHERS = {
    ".pdf": ("pypdf", "pdfminer.six", "markitdown"),
    ".docx": ("markitdown",),
    ".html": ("trafilatura", "markitdown"),
    ".epub": ("markitdown",),
}
READERS = """
import json, sys
def read(name, path):
    if name == "pypdf":
        from pypdf import PdfReader
        return "\\n".join(page.extract_text() for page in PdfReader(path).pages)
    if name == "pdfminer.six":
        from pdfminer.high_level import extract_text
        return extract_text(path)
    if name == "trafilatura":
        import trafilatura
        return trafilatura.extract(open(path, encoding="utf-8").read()) or ""
    from markitdown import MarkItDown
    return MarkItDown().convert(path).text_content
for name, path in json.load(sys.stdin):
    try:
        text = read(name, path)
    except Exception as error:
        text = ""
    print(json.dumps([name, path, text]))
"""


def main(texts: Path, work: Path, other_python: str) -> None:
    """Render, read, compare, print a table."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from utils.data.extraction.formats import read_file

    work.mkdir(parents=True, exist_ok=True)
    files = [file for number, text in enumerate(_texts(texts)) for file in _render(work, number, text)]
    wanted = [(name, str(path)) for path, _, _ in files for name in OTHERS[path.suffix]]
    done = subprocess.run(
        [other_python, "-c", READERS], input=json.dumps(wanted), capture_output=True, text=True, check=True
    )
    read = {(name, path): text for name, path, text in map(json.loads, done.stdout.splitlines())}
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for path, kind, reference in files:
        found = {"ours": read_file(path).documents[0][1]}
        found |= {name: read[name, str(path)] for name in OTHERS[path.suffix]}
        for name, text in found.items():
            rows.setdefault((kind, name), []).append(scores(reference, text))
    print(f"{'format':<22} {'reader':<13} recall precision order")
    for (kind, name), values in sorted(rows.items()):
        means = [100 * sum(column) / len(values) for column in zip(*values, strict=True)]
        print(f"{kind:<22} {name:<13} {means[0]:6.2f} {means[1]:9.2f} {means[2]:5.2f}")


def scores(reference: str, text: str) -> tuple[float, float, float]:
    """(recall, precision, order) of words: order is the longest common subsequence over the reference's length."""
    wanted, found = words(reference), words(text)
    shared = sum((Counter(wanted) & Counter(found)).values())
    return shared / len(wanted), shared / max(1, len(found)), longest_common_subsequence(wanted, found) / len(wanted)


def words(text: str) -> list[str]:
    """Words and numbers, without case."""
    return re.findall(r"\w+", text.casefold())


def _texts(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    long = [row["text"] for row in rows if len(row["text"]) > CHARACTERS // 2]
    return [re.sub(r"[^\w\s.,;()'?!-]", " ", text[:CHARACTERS]) for text in long[:DOCUMENTS]]


def _markdown(number: int, text: str) -> str:
    """A document with every kind of block; the words of `text` in their order."""
    paragraphs = [" ".join(p.split()) for p in text.split("\n") if len(p.split()) > 5]
    blocks = [f"# Document number {number}"]
    for at, paragraph in enumerate(paragraphs):
        if at % 5 == 1:
            blocks.append(f"## Part {at}")
        if at % 7 == 3:
            blocks.append("\n".join(f"- {part.strip()}" for part in paragraph.split(". ") if part.strip()))
        elif at % 7 == 5:
            cells = (paragraph.split() + [""] * 12)[:12]
            lines = ["| Name | Value | Unit |", "|---|---|---|"]
            lines += [f"| {cells[i]} | {cells[i + 1] if i % 2 else ''} | {cells[i + 2]} |" for i in range(0, 12, 3)]
            blocks += ["\n".join(lines), " ".join(paragraph.split()[12:])]
        else:
            blocks.append(paragraph)
    blocks.append("```\nvalue = compute(first, second)\nprint(value)\n```")
    return "\n\n".join(filter(None, blocks)) + "\n"


def _render(work: Path, number: int, text: str) -> list[tuple[Path, str, str]]:
    """(file, what it is, its words in order) of every format."""
    source = work / f"{number}.md"
    markdown = _markdown(number, text)
    source.write_text(markdown, encoding="utf-8")
    reference = re.sub(r"(?m)^\|---.*$|^```$", "", markdown)
    made = []
    for suffix in (".docx", ".html", ".epub"):
        path = work / f"{number}{suffix}"
        extra = ["--standalone", "--metadata", f"pagetitle={number}"] if suffix == ".html" else []
        _run("pandoc", "-f", "markdown-smart", str(source), *extra, "-o", str(path))
        made.append((path, suffix[1:], reference))
    for columns in (1, 2):
        laid_out = work / f"{number}-{columns}.docx"
        _with_running_lines(work / f"{number}.docx", laid_out, columns)
        _run("soffice", "--headless", "--convert-to", "pdf", "--outdir", str(work), str(laid_out))
        made.append((laid_out.with_suffix(".pdf"), f"pdf, {columns} column{'s' * (columns > 1)}", reference))
    return made


def _with_running_lines(source: Path, target: Path, columns: int) -> None:
    from docx import Document
    from docx.oxml.ns import qn

    document = Document(str(source))
    section = document.sections[0]
    section.header.paragraphs[0].text, section.footer.paragraphs[0].text = HEADER, FOOTER
    cols = section._sectPr.find(qn("w:cols"))
    cols = section._sectPr.makeelement(qn("w:cols"), {}) if cols is None else cols
    if cols.getparent() is None:
        section._sectPr.append(cols)
    cols.set(qn("w:num"), str(columns))
    cols.set(qn("w:space"), "400")
    document.save(str(target))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
