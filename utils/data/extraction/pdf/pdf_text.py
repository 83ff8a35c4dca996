"""Text of a PDF file as it is read: pages in columns, without running headers, words whole, scripts in their order.

pdfium gives characters and their places; `pdf_pieces` and `pdf_layout` make lines of them, this module makes one text
of the lines of all pages.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from utils.data.extraction.extracted import RUNNING, Extracted, NoTextError, visible_characters
from utils.data.extraction.pdf.pdf_layout import lines_of, rows_of
from utils.data.extraction.pdf.pdf_pieces import PdfPage, read_page
from utils.data.extraction.pdf.right_to_left import in_reading_order
from utils.data.extraction.pdf.running_headers import without_running_headers

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
    kept = without_running_headers(upright)
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
    pdf = Extracted.whole(_without_hyphens(text), visible=visible, pages=len(pages), pages_without_text=without_text)
    if removed > 0:
        pdf.removed[RUNNING] = removed
    if without_text:
        pdf.notes.append(f"{without_text} of {len(pages)} pages have no text layer (images): run OCR on them first")
    return pdf


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
    words = Counter(word.lower() for word in _WORD.findall(_HYPHENATED.sub(" ", text)))

    def join(match: re.Match[str]) -> str:
        left, right = match[1], match[2]
        whole, compound = words[(left + right).lower()], words[f"{left}-{right}".lower()]
        last = re.split("[-‐]", left)[-1]
        is_compound = "-" in left or len(last) == 1 or last.lower() in _COMPOUNDS
        keeps = compound > whole or (compound == whole and is_compound)
        return f"{left}-{right}" if keeps else left + right

    return _HYPHENATED.sub(join, text)
