"""Text out of one HTML, PDF or Word file, and the cleaning that every document gets.

A file that holds no text (a scan, an encrypted PDF, a damaged archive) raises NoTextError with the reason; what that
means (an error, or one file dropped out of a thousand) is the caller's decision.
"""

from __future__ import annotations

import re
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from docx.document import Document
    from docx.table import Table

# of a Word file with its pictures; a few KB can hold gigabytes of zeros
LARGEST_ARCHIVE = 1 << 30

_LINE_BREAKS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# surrogates too: pypdf can return halves of a pair, and no tokenizer or Arrow file takes them
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_MANY_BLANK_LINES = re.compile(r"\n{4,}")
# only before a small letter: "Graeco-\nRoman" keeps its hyphen
_HYPHENATION = re.compile(r"(?<=[^\W\d_])[-\u00ad\u2010][ \t]*\n[ \t]*(?=[^\W\d_A-Z])")


class NoTextError(Exception):
    """The file was opened, or tried, and gave no text; the message is the reason."""


def clean_text(text: str) -> str:
    """NFC, `\\n` line ends, no control characters but tab, no blanks at line ends, at most two blank lines in a row."""
    text = _CONTROLS.sub("", _LINE_BREAKS.sub("\n", text))
    lines = "\n".join(line.rstrip() for line in unicodedata.normalize("NFC", text).split("\n"))
    return _MANY_BLANK_LINES.sub("\n\n\n", lines).strip("\n")


def extract_html(markup: str) -> str:
    """The main text of a page: trafilatura leaves out menus and footers; where it finds nothing, all visible text.

    Raises NoTextError if the page has no visible text, ImportError if trafilatura or BeautifulSoup is not installed.
    """
    import trafilatura
    from bs4 import BeautifulSoup

    if text := trafilatura.extract(markup, include_comments=False, include_tables=True):
        return text
    soup = BeautifulSoup(markup, "html.parser")
    for hidden in soup(["script", "style", "noscript", "template", "head"]):
        hidden.decompose()
    if text := soup.get_text("\n", strip=True):
        return text
    raise NoTextError("the page has no visible text")


def extract_pdf(path: Path) -> str:
    """The text layer, page by page, words hyphenated at a line end joined.

    Raises NoTextError if the file is encrypted, damaged or a scan, ImportError if pypdf is not installed.
    """
    from pypdf import PdfReader

    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise NoTextError("the PDF is encrypted; save it without a password")
        pages = [page.extract_text() for page in reader.pages]
    except NoTextError:
        raise
    except Exception as error:
        raise NoTextError(f"the PDF cannot be parsed ({type(error).__name__}: {error})") from error
    text = _HYPHENATION.sub("", "\n\n".join(page.strip("\n") for page in pages if page.strip()))
    if not text.strip():
        raise NoTextError(
            f"none of the PDF's {len(pages)} pages has a text layer; it may be a scan: run OCR on it first"
        )
    return text


def extract_docx(path: Path) -> str:
    """Paragraphs and tables in their order; a table row becomes one line, its cells joined by " | ".

    Raises NoTextError if the file is damaged or has no text, ImportError if python-docx is not installed.
    """
    from docx import Document

    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > LARGEST_ARCHIVE:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, more than {LARGEST_ARCHIVE:,}")
        text = "\n".join(_docx_lines(Document(str(path))))
    except Exception as error:
        raise NoTextError(f"the Word file cannot be parsed ({type(error).__name__}: {error})") from error
    if not text.strip():
        raise NoTextError("the Word file has no text")
    return text


def _docx_lines(document: Document) -> Iterator[str]:
    from docx.table import Table

    for block in document.iter_inner_content():
        if isinstance(block, Table):
            yield from _table_lines(block)
        else:
            yield block.text
        yield ""  # a blank line between paragraphs, as in every other format


def _table_lines(table: Table) -> Iterator[str]:
    for row in table.rows:
        cells: dict[int, str] = {}
        for cell in row.cells:
            # python-docx returns a merged cell once per column it spans
            cells.setdefault(id(cell._tc), " ".join(cell.text.split()))
        yield " | ".join(cells.values())
