"""What the reading of one file gives, and why a file cannot be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

NO_TEXT = "no text could be extracted"
MENUS, HIDDEN, RUNNING = "menus, headers and footers of web pages", "hidden text", "running headers and footers"
DRAWN = "words in drawings and form fields of pages"


class NoTextError(Exception):
    """The file was opened, or tried, and gave no text; the message is the reason.

    `kind` is what is counted, `place` is put behind the file's name (":12"), `fix` is what to do.
    """

    def __init__(self, reason: str, *, kind: str = NO_TEXT, place: str = "", fix: str = ""):
        super().__init__(reason)
        self.kind, self.place, self.fix = kind, place, fix


@dataclass
class Extracted:
    """Documents of one file, and what is not in them.

    Extraction: `visible` characters (other than blanks, as a reader of the file sees them) = those in the text + the
    sum of `removed`; `visible` is 0 where a format has nothing to leave out. Cleaning: `characters` = those of the
    documents + the sum of `cleaned`.
    """

    documents: list[tuple[str, str]]
    """(what is added to the file's name, "" for all of it; text)."""
    visible: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    undecoded: int = 0
    """Marks U+FFFD that stand for characters which the file does not tell."""
    pages: int = 0
    pages_without_text: int = 0
    notes: list[str] = field(default_factory=list)
    """What else a person should know, as sentences behind the file's name."""

    @classmethod
    def whole(cls, text: str, **facts: Any) -> Extracted:
        """One document that is all of the file."""
        return cls([("", text)], **facts)


def visible_characters(text: str) -> int:
    """Characters other than blanks."""
    return sum(map(len, text.split()))
