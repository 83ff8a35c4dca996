"""The numbers that Word shows in front of paragraphs: `3.`, `b)`, `2.1` before a heading. They are not in its text.

mammoth knows that a list is numbered, but neither how it counts nor where it goes on after a paragraph in between. So
each number is written into its paragraph between two marks, and taken from there once mammoth is done.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from utils.data.extraction.extracted import visible_characters
from utils.data.extraction.pages.html_text import ITEM_NUMBER

Element = Any

_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
# private characters, which no font shows
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"
_MARKED = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
_ITEM, _BLOCKS = "li", ("li", "p", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "dt", "dd")
_ROMAN = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"))
_ROMAN += ((10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i"))
_LARGEST, _LONGEST = 10_000, 60


@dataclass(frozen=True)
class _Level:
    start: int
    form: str
    text: str
    is_legal: bool


@dataclass
class Numbering:
    """`word/numbering.xml` and what `word/styles.xml` says of numbers."""

    lists: dict[str, dict[int, _Level]] = field(default_factory=dict)
    numbers: dict[str, tuple[str, dict[int, int]]] = field(default_factory=dict)
    """Number of a list -> (its definition, level -> where it starts anew)."""
    styles: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    levels_of_styles: dict[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, numbering: Element, styles: Element | None) -> Numbering:
        """From the parsed parts."""
        definitions = cls()
        for one in numbering.iter(_WORD + "abstractNum"):
            name, levels = one.get(_WORD + "abstractNumId") or "", {}
            for level in one.iter(_WORD + "lvl"):
                at = _integer(level.get(_WORD + "ilvl"))
                form, text = _value(level, "numFmt") or "decimal", _value(level, "lvlText") or ""
                is_legal = level.find(_WORD + "isLgl") is not None
                levels[at] = _Level(_integer(_value(level, "start"), 1), form, text, is_legal)
                if style := _value(level, "pStyle"):
                    definitions.levels_of_styles[name, style] = at
            definitions.lists[name] = levels
        for one in numbering.iter(_WORD + "num"):
            anew = {
                _integer(override.get(_WORD + "ilvl")): _integer(start, 1)
                for override in one.iter(_WORD + "lvlOverride")
                if (start := _value(override, "startOverride"))
            }
            definitions.numbers[one.get(_WORD + "numId") or ""] = (_value(one, "abstractNumId") or "", anew)
        for style in styles.iter(_WORD + "style") if styles is not None else ():
            if (own := style.find(f"{_WORD}pPr/{_WORD}numPr")) is not None and (number := _value(own, "numId")):
                level = _value(own, "ilvl")
                definitions.styles[style.get(_WORD + "styleId") or ""] = (number, _integer(level) if level else None)
        return definitions

    def place(self, paragraph: Element) -> tuple[str, int] | None:
        """(number of its list, level) of a paragraph; None where it has none."""
        style = _value(paragraph.find(_WORD + "pPr"), "pStyle") or ""
        by_style = self.styles.get(style, ("", None))
        own = paragraph.find(f"{_WORD}pPr/{_WORD}numPr")
        number = (_value(own, "numId") or by_style[0]) if own is not None else by_style[0]
        if number not in self.numbers:
            return None
        level = _value(own, "ilvl") if own is not None else None
        if level is None:
            linked = self.levels_of_styles.get((self.numbers[number][0], style), 0)
            return number, by_style[1] if by_style[1] is not None else linked
        return number, _integer(level)


def write_numbers(root: Element, numbering: Numbering, run: Any) -> None:
    """Puts the number of each paragraph, between marks, in front of its text; `run(text)` makes a run."""
    counts: dict[str, dict[int, int]] = {}
    begun: set[tuple[str, int]] = set()
    for paragraph in root.iter(_WORD + "p"):
        is_deleted = paragraph.find(f"{_WORD}pPr/{_WORD}rPr/{_WORD}del") is not None  # joined with the next one
        if is_deleted or (place := numbering.place(paragraph)) is None:
            continue
        number, at = place
        name, anew = numbering.numbers[number]
        levels = numbering.lists.get(name, {})
        if at not in levels:
            continue
        count = counts.setdefault(name, {})
        if at in anew and (number, at) not in begun:
            count.pop(at, None)
        begun.add((number, at))
        count[at] = count[at] + 1 if at in count else anew.get(at, levels[at].start)
        for deeper in [level for level in count if level > at]:
            del count[deeper]
        if levels[at].form not in ("bullet", "none") and (text := _shown(levels, count, at)):
            first = paragraph.find(_WORD + "pPr")
            paragraph.insert(0 if first is None else 1, run(f"{_OPEN}{text}{_CLOSE}"))


def take_numbers(root: Element) -> int:
    """Moves the numbers from the texts of a page to its items, or writes them before headings and paragraphs.

    Returns the characters of those that are text of the page now.
    """
    written = 0
    for element in list(root.iter()):
        for name in ("text", "tail"):
            content = getattr(element, name)
            if not (content and (match := _MARKED.search(content))):
                continue
            inside = element if name == "text" else element.getparent()
            block = next((e for e in (inside, *inside.iterancestors()) if e.tag in _BLOCKS), None)
            number = ""
            if block is not None and block.tag == _ITEM:
                block.set(ITEM_NUMBER, match[1])
            else:
                number, written = f"{match[1]} ", written + visible_characters(match[1])
            setattr(element, name, content[: match.start()] + number + content[match.end() :])
    return written


def _shown(levels: dict[int, _Level], count: dict[int, int], at: int) -> str:
    def number(match: re.Match[str]) -> str:
        level = int(match[1]) - 1
        if level not in levels:
            return ""
        form = "decimal" if levels[at].is_legal else levels[level].form
        return _counted(count.get(level, levels[level].start), form)

    return re.sub(r"%([1-9])", number, levels[at].text[:_LONGEST]).strip()


def _counted(number: int, form: str) -> str:
    if form in ("lowerLetter", "upperLetter") and 0 < number < _LARGEST:
        text = chr(ord("a") + (number - 1) % 26) * ((number - 1) // 26 + 1)
    elif form in ("lowerRoman", "upperRoman") and 0 < number < _LARGEST:
        text = ""
        for value, letters in _ROMAN:
            text, number = text + letters * (number // value), number % value
    else:
        text = f"{number:02}" if form == "decimalZero" else str(number)
    return text.upper() if form.startswith("upper") else text


def _value(element: Element | None, name: str) -> str | None:
    child = element.find(_WORD + name) if element is not None else None
    return child.get(_WORD + "val") if child is not None else None


def _integer(text: str | None, default: int = 0) -> int:
    return int(text) if text and re.fullmatch(r"-?\d{1,9}", text) else default
