"""Running headers, footers and page numbers of a PDF: what stands at the same edge of many of its pages is left out."""

from __future__ import annotations

import itertools
import re
from collections import Counter

from utils.data.extraction.pdf.pdf_layout import PageRow

# rows at an edge of a page that may be running headers and footers; pages from which they are looked for
EDGE_ROWS, FEWEST_PAGES = 4, 3
# shares of pages: what is the same on most of them is a running line, what is on some only where it stands apart
MOST_PAGES, SOME_PAGES = 0.8, 0.1
APART = 1.4
_PAGE_NUMBER = re.compile(
    r"\W*(?:page|seite|p\.|pg\.?|página|pagina|стр\.?|第)?\W*(?:#+|[ivxlc]{1,7})\W*(?:(?:of|von|de|di|sur|/|из)\W*#+)?\W*页?\W*",
    re.I,
)


def without_running_headers(pages: list[list[PageRow]]) -> list[list[PageRow]]:
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
