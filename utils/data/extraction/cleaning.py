"""The cleaning that every document gets: nothing is deleted that is not counted.

C1 characters are read as windows-1252, as the
WHATWG's encoding standard reads Latin-1: nobody means control characters by them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from utils.data.extraction.text_decoding import MARK

BLANKS, COMPOSED, PICTURES, SOFT_HYPHENS = (
    "white space",
    "composed accents",
    "embedded pictures and files (base64)",
    "soft hyphens",
)

_LINE_BREAKS = re.compile(r"\r\n?|[\x0b\x0c\u2028\u2029]")
_BREAKS = "\r\x0b\x0c\u2028\u2029"
_SOFT_HYPHEN = re.compile("\u00ad")
_MANY_BLANK_LINES = re.compile(r"\n{4,}")
_BASE64 = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,[A-Za-z0-9+/=_-]{40,}")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_C1 = {
    chr(code): character
    for code in range(0x80, 0xA0)
    if (character := bytes([code]).decode("cp1252", "replace")) != MARK
}


@dataclass(frozen=True)
class CleanText:
    """A clean text, what was removed from it (reason -> characters; composing may lengthen), and its marks U+FFFD."""

    text: str
    removed: Counter[str]
    undecoded: int


def clean_text(text: str) -> str:
    """NFC, `\\n` line ends, no control characters but tab, no blanks at line ends, at most two blank lines in a row."""
    return cleaned(text).text


def cleaned(text: str) -> CleanText:
    """`clean_text` with the account of it: len(text) == len(result) + the sum of what was removed."""
    removed: Counter[str] = Counter()
    undecoded = 0

    def step(reason: str, after: str) -> str:
        if len(after) != len(text):
            removed[reason] += len(text) - len(after)
        return after

    if _CONTROLS.search(text):
        text = step("surrogate pairs joined", _PAIR.sub(_joined, text))
        # a lone NEL is a line end of mainframes, and beside other line ends the ellipsis of windows-1252
        text = text.replace("\x85", "\n") if "\n" not in text and "\r" not in text else text
        text = _CONTROLS.sub(lambda match: _C1.get(match[0], MARK), text)
        undecoded = text.count(MARK)
    if ";base64," in text:
        text = step(PICTURES, _BASE64.sub("", text))
    if "\u00ad" in text:
        text = step(SOFT_HYPHENS, _SOFT_HYPHEN.sub("", text))
    # `in` is much faster than a pattern, and most texts have none of them
    if any(mark in text for mark in _BREAKS):
        text = step(BLANKS, _LINE_BREAKS.sub("\n", text))
    if not unicodedata.is_normalized("NFC", text):
        text = step(COMPOSED, unicodedata.normalize("NFC", text))
    # not a pattern: `\s+$` takes quadratic time on a long run of blanks
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    if "\n\n\n\n" in lines:
        lines = _MANY_BLANK_LINES.sub("\n\n\n", lines)
    return CleanText(step(BLANKS, lines.strip("\n")), removed, undecoded)


def _joined(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16", "surrogatepass").decode("utf-16")
