"""Lines of Arabic, Hebrew and their neighbours in the order in which they are read, out of their order on the page.

A correct file shows such a line from right to left, so the characters from left to right are the reverse of what is
read. Some producers place them in reading order, as if the script ran to the right. Which of the two a file is, its
words tell: Arabic's article stands at a word's beginning, ta marbuta and Hebrew's five final letters at its end.
"""

from __future__ import annotations

import re
import unicodedata

_RTL = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]")
_RTL_RUN = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff](?:[^\n]*[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff])?")
_FORMS = re.compile("[\ufb1d-\ufdfb\ufe70-\ufefc]+")
# what runs to the right inside of it: words of other scripts and numbers, with what stands between them
_TO_THE_RIGHT = re.compile(r"[^\W\u0590-\u06ff]+(?:[^\w\s]?\s?[^\W\u0590-\u06ff]+)*|[٠-٩۰-۹]+(?:[.,٫٬/:-][٠-٩۰-۹]+)*")
_AT_THE_END = "ةىךםןףץ"
_MIRRORED = str.maketrans("()[]{}<>«»", ")(][}{><»«")


def in_reading_order(text: str) -> str:
    """The text with its right-to-left lines turned, if the file shows them as they are read; letters without forms."""
    if not _RTL.search(text):
        return text
    lines = text.split("\n")
    turned = [_turned(line) if _RTL.search(line) else line for line in lines]
    chosen = turned if _evidence(turned) >= _evidence(lines) else lines
    return _FORMS.sub(lambda match: unicodedata.normalize("NFKC", match[0]), "\n".join(chosen))


def _turned(line: str) -> str:
    cells = line.split(" | ")
    if len(cells) > 1:
        return " | ".join(map(_turned, cells))
    rtl = len(_RTL.findall(line))
    others = sum(c.isalpha() for c in line) - rtl
    if rtl >= others:
        return _reversed(line)
    return _RTL_RUN.sub(lambda match: _reversed(match[0]), line)


def _reversed(text: str) -> str:
    """The characters from right to left, marks behind their letters, numbers and words of other scripts as they are."""
    clusters: list[str] = []
    for character in text:
        if clusters and unicodedata.combining(character):
            clusters[-1] += character
        else:
            clusters.append(character)
    backwards = "".join(reversed(clusters)).translate(_MIRRORED)
    return _TO_THE_RIGHT.sub(lambda match: match[0][::-1], backwards)


def _evidence(lines: list[str]) -> int:
    words = [word for line in lines if _RTL.search(line) for word in re.findall(r"\w+", _plain(line))]
    return sum(
        word.startswith("ال") + word.endswith(tuple(_AT_THE_END)) - word.startswith(tuple(_AT_THE_END))
        for word in words
    )


def _plain(line: str) -> str:
    return _FORMS.sub(lambda match: unicodedata.normalize("NFKC", match[0]), line)
