"""Text of a PDF file as it is read: pages in columns, without running headers, words whole, scripts in their order.

pdfium gives characters and their places; `pdf_pieces` and `pdf_layout` make lines of them, this module makes one text
of the lines of all pages.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

from utils.data.extraction.extracted import RUNNING, Extracted, NoTextError, visible_characters
from utils.data.extraction.pdf.pdf_layout import PageRow, lines_of, rows_of
from utils.data.extraction.pdf.pdf_pieces import PdfPage, read_page
from utils.data.extraction.pdf.right_to_left import in_reading_order

# rows at an edge of a page that may be running headers and footers; pages from which they are looked for
EDGE_ROWS, FEWEST_PAGES = 4, 3
# shares of pages: what is the same on most of them is a running line, what is on some only where it stands apart
MOST_PAGES, SOME_PAGES = 0.8, 0.1
APART = 1.4
_PAGE_NUMBER = re.compile(
    r"\W*(?:page|seite|p\.|pg\.?|página|pagina|стр\.?|第)?\W*(?:#+|[ivxlc]{1,7})\W*(?:(?:of|von|de|di|sur|/|из)\W*#+)?\W*页?\W*",
    re.I,
)
# before a number or a capital letter a hyphen is always part of what is written: 10-20, Graeco-Roman
_KEPT_HYPHEN = re.compile(r"(?<=\w)([-\u2010])\n(?=[\dA-ZÀ-ÖØ-ÞΑ-ΩА-Я])")
_HYPHENATED = re.compile(r"([^\W\d_]+(?:[-‐][^\W\d_]+)*)[-\u00ad\u2010]\n([^\W\d_]+)")
_WORD = re.compile(r"[^\W\d_]+(?:[-‐][^\W\d_]+)*")
# before these a hyphen is part of the word, when the document does not write it otherwise
_COMPOUNDS = frozenset(
    ["self", "well", "non", "ex", "all", "half", "cross", "quasi", "one", "two", "three", "four", "five", "six", "ten"]
)
_SENTENCE_END = re.compile(r"[.!?:;。！？…][\"'”’)\]]*$")


def extract_pdf(path: Path) -> Extracted:
    """The text layer of all pages. Raises NoTextError if the file is encrypted, damaged, or all of it are pictures."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if "assword" in str(error):
            raise NoTextError("the PDF is encrypted; save it without a password") from error
        raise NoTextError(f"the PDF cannot be parsed ({error})") from error
    pages: list[PdfPage] = []
    try:
        for number in range(len(document)):
            pages.append(_page(document, number))
    finally:
        document.close()
    return _whole(pages)


def _page(document: object, number: int) -> PdfPage:
    import pypdfium2

    try:
        page = document[number]
    except pypdfium2.PdfiumError:  # one damaged page of a file whose others are whole
        return PdfPage([], is_picture=True, is_blank=False)
    try:
        return read_page(page)
    finally:
        page.close()


def _whole(pages: list[PdfPage]) -> Extracted:
    rows = [[rows_of(group) for group in page.pieces] for page in pages]
    upright = [groups[0] if groups else [] for groups in rows]
    visible = sum(visible_characters(row.text) for groups in rows for group in groups for row in group)
    visible += sum(visible_characters(text) for page in pages for text in page.aslant)
    stamps = Counter(text for page in pages for text in set(page.aslant))
    kept = _without_running(upright)
    # a page that is like all others, a form for example, is no header
    kept = [
        rest or (whole if not page.is_picture else []) for page, whole, rest in zip(pages, upright, kept, strict=True)
    ]
    texts, without_text = [], 0
    for page, groups, main in zip(pages, rows, kept, strict=True):
        lines = [line for group in ([main] if main else []) + groups[1:] for line in [*lines_of(group), ""]]
        lines += [text for text in page.aslant if stamps[text] < max(2, len(pages) / 2)]  # the others are watermarks
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        is_without = page.is_picture or (not text.strip() and not page.is_blank)
        without_text += is_without
        texts.append(text)
    removed = visible - sum(visible_characters(text.replace(" | ", " ")) for text in texts)
    if not any(text.strip() for text in texts) or without_text == len(pages):
        what = f"none of the PDF's {len(pages)} pages has a text layer; it may be a scan: run OCR on it first"
        raise NoTextError(what)
    text = in_reading_order(_joined(texts))
    found = Extracted.whole(_without_hyphens(text), visible=visible, pages=len(pages), pages_without_text=without_text)
    if removed > 0:
        found.removed[RUNNING] = removed
    if without_text:
        found.notes.append(f"{without_text} of {len(pages)} pages have no text layer (images): run OCR on them first")
    return found


def _without_running(pages: list[list[PageRow]]) -> list[list[PageRow]]:
    """The rows of each page without what stands at the same edge of many others."""
    if sum(map(bool, pages)) < FEWEST_PAGES:
        return pages
    kept = pages
    for from_top in (True, False):
        ordered = [rows if from_top else rows[::-1] for rows in kept]
        repeated = _Repeated(ordered)
        cut = [rows[repeated.rows(rows) :] for rows in ordered]
        kept = [rows if from_top else rows[::-1] for rows in cut]
    return kept


class _Repeated:
    """What stands in the outermost rows of pages, and on how many of them; pages begin at their edge."""

    def __init__(self, pages: list[list[PageRow]]):
        self._exact, self._alike = Counter[str](), Counter[str]()
        for rows in pages:
            texts = {_key(text) for row in rows[:EDGE_ROWS] for text in (row.text, *(p.text for p in row.pieces))}
            self._exact.update(texts)
            self._alike.update({_pattern(text) for text in texts})
        self._most = max(FEWEST_PAGES, MOST_PAGES * len(pages))
        self._some = max(FEWEST_PAGES, SOME_PAGES * len(pages))

    def rows(self, rows: list[PageRow]) -> int:
        """How many rows from the edge of a page on are running ones."""
        steps = sorted(abs(a.middle - b.middle) for a, b in itertools.pairwise(rows))
        usual = steps[len(steps) // 2] if steps else 0.0
        running = 0
        for number, row in enumerate(rows[:EDGE_ROWS], 1):
            if self._is_running(row.text) or all(self._is_running(piece.text) for piece in row.pieces):
                running = number
            elif self._alike[_pattern(row.text)] < self._some:
                break
            # lines of the text may be alike on some pages, or differ by a number; running ones stand apart
            elif number < len(rows) and abs(row.middle - rows[number].middle) > APART * usual:
                running = number
        return running

    def _is_running(self, text: str) -> bool:
        pattern = _pattern(text)
        is_number = bool(_PAGE_NUMBER.fullmatch(pattern)) and self._alike[pattern] >= self._some
        return is_number or self._exact[_key(text)] >= self._most


def _pattern(text: str) -> str:
    return re.sub(r"\d+", "#", _key(text))


def _key(text: str) -> str:
    return " ".join(text.split())


def _joined(texts: list[str]) -> str:
    """Pages one after the other; a sentence that goes on behind a page's end does so in the next line."""
    whole = ""
    for text in filter(None, texts):
        goes_on = bool(whole) and not _SENTENCE_END.search(whole) and text[:1].islower()
        whole += f"\n{text}" if goes_on else f"\n\n{text}" if whole else text
    return whole


def _without_hyphens(text: str) -> str:
    """Words that a line end cuts, as the document writes them elsewhere; else without the hyphen."""
    text = _KEPT_HYPHEN.sub(r"\1", text)
    if not _HYPHENATED.search(text):
        return text
    words = Counter(found.lower() for found in _WORD.findall(_HYPHENATED.sub(" ", text)))

    def join(found: re.Match[str]) -> str:
        left, right = found[1], found[2]
        whole, compound = words[(left + right).lower()], words[f"{left}-{right}".lower()]
        last = re.split("[-‐]", left)[-1]
        is_compound = "-" in left or len(last) == 1 or last.lower() in _COMPOUNDS
        keeps = compound > whole or (compound == whole and is_compound)
        return f"{left}-{right}" if keeps else left + right

    return _HYPHENATED.sub(join, text)
