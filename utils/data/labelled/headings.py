"""The headings of a long document as documents of their own: one handbook with sixty questions can be split. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_HEADING = re.compile(r"(?P<marks>#{1,6})\s+(?P<title>\S.*?)\s*#*\s*")
DEEPEST, FEWEST_PARTS = 6, 3
# a shorter answer may stand anywhere
SHORTEST_ANSWER = 8


def parts(examples: Sequence[Mapping[str, Any]], text: str) -> list[str] | None:
    """The heading below which each pair's context, or its answer where it stands there once, is found in the text.

    Of the levels of headings the highest that gives at least three parts, none with most pairs; None where none does.
    """
    squeezed, headings = _squeezed(text)
    places = [_place(example, squeezed) for example in examples]
    for level in range(1, DEEPEST + 1):
        starts = [(at, title) for at, depth, title in headings if depth <= level]
        titles = [_below(place, starts) for place in places]
        counted = Counter(titles)
        if len(counted) >= FEWEST_PARTS and 2 * counted.most_common(1)[0][1] <= len(titles):
            return titles
    return None


def _squeezed(text: str) -> tuple[str, list[tuple[int, int, str]]]:
    """The text with single blanks, and (place, depth, title) of its headings in it."""
    pieces: list[str] = []
    headings: list[tuple[int, int, str]] = []
    size = 0
    fenced = False
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        if (match := _HEADING.fullmatch(line)) and not fenced:  # in a block of code # is a comment
            headings.append((size, len(match["marks"]), match["title"]))
        words = " ".join(line.split())
        if words:
            pieces.append(words)
            size += len(words) + 1
    return " ".join(pieces), headings


def _place(example: Mapping[str, Any], squeezed: str) -> int:
    if context := " ".join((example.get("context") or "").split()):
        return squeezed.find(context)
    answer = " ".join(example["answers"][0].split())
    return squeezed.find(answer) if len(answer) >= SHORTEST_ANSWER and squeezed.count(answer) == 1 else -1


def _below(place: int, starts: Sequence[tuple[int, str]]) -> str:
    titles = [title for at, title in starts if at <= place]
    return titles[-1] if place >= 0 and titles else ""
