"""What became of every file, row and character of the documents that were read: for the manifest and for one screen."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.data.extraction.extracted import Extracted
from utils.data.tables import UniqueIds, digest16

logger = logging.getLogger(__name__)

DUPLICATE, EMPTY = "duplicate", "empty"

LISTED, LISTED_SHARES = 100, 1000
SHOWN = 5


@dataclass(frozen=True)
class ReadReport:
    """What was read and what was left out.

    Characters add up: `characters_extracted` = `characters` + the sums of `cleaned` and `dropped_characters`. Where a
    format has parts that are no text (menus, running headers), `visible` characters other than blanks = those that
    were extracted + the sum of `removed`.
    """

    files: int
    """Files and hub datasets that were opened."""
    documents: int
    characters: int
    utf8_bytes: int
    dropped: dict[str, int]
    """Reason -> number of files, rows or documents that were left out."""
    skipped_files: list[str]
    """Files out of folders that were not used, the first 100: another suffix, or unreadable."""
    unreadable: list[str] = field(default_factory=list)
    """The first 100 files and rows that could not be read, each with the reason."""
    rows: int = 0
    """Rows of tables."""
    characters_extracted: int = 0
    cleaned: dict[str, int] = field(default_factory=dict)
    dropped_characters: dict[str, int] = field(default_factory=dict)
    visible: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    kept_shares: dict[str, float] = field(default_factory=dict)
    """File -> share of its visible text that is in its document, of the first 1,000 files with less than all of it."""
    undecoded: int = 0
    """Characters that could not be decoded; each is U+FFFD in the text."""
    pages: int = 0
    pages_without_text: int = 0
    columns_used: dict[str, int] = field(default_factory=dict)
    """Column with the text -> tables."""
    columns_not_used: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """The first 100 sentences about single files."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain values for a manifest."""
        return asdict(self)


@dataclass
class ReadTally:
    """The counts of a `ReadReport` while they grow, the ids and texts that were seen, 32 bytes of each."""

    files: int = 0
    documents: int = 0
    characters: int = 0
    utf8_bytes: int = 0
    rows: int = 0
    characters_extracted: int = 0
    visible: int = 0
    undecoded: int = 0
    pages: int = 0
    pages_without_text: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cleaned: Counter[str] = field(default_factory=Counter)
    dropped_characters: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    kept_shares: dict[str, float] = field(default_factory=dict)
    columns_used: Counter[str] = field(default_factory=Counter)
    columns_not_used: Counter[str] = field(default_factory=Counter)
    skipped_files: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _ids: UniqueIds = field(default_factory=UniqueIds)
    _texts: set[bytes] = field(default_factory=set)

    def accept(self, wanted_id: str, text: str) -> dict[str, str] | None:
        """A clean text as a document; None, counted, if it is empty or a duplicate."""
        digest = digest16(text)
        if not text.strip() or digest in self._texts:
            reason = DUPLICATE if text.strip() else EMPTY
            self.dropped[reason] += 1
            self.dropped_characters[reason] += len(text)
            return None
        self._texts.add(digest)
        self.documents += 1
        self.characters += len(text)
        self.utf8_bytes += len(text.encode("utf-8"))
        return {"id": self._ids.claim(wanted_id), "text": text}

    def account(self, name: str, extracted: Extracted) -> None:
        """Count what a file's reading and cleaning left out."""
        self.characters_extracted += extracted.characters
        self.cleaned.update(extracted.cleaned)
        self.visible += extracted.visible
        self.removed.update(extracted.removed)
        if (left_out := extracted.removed.total()) and len(self.kept_shares) < LISTED_SHARES:
            self.kept_shares[name] = round(1 - left_out / max(1, extracted.visible), 3)
        self.undecoded += extracted.undecoded
        self.pages += extracted.pages
        self.pages_without_text += extracted.pages_without_text
        undecoded = (
            [f"{extracted.undecoded:,} characters of {name} could not be decoded"] if extracted.undecoded else []
        )
        for note in (*undecoded, *(f"{name}: {note}" for note in extracted.notes)):
            if len(self.notes) < LISTED:
                logger.warning("%s", note)
                self.notes.append(note)

    def skip(self, path: Path, kind: str, reason: str = "") -> None:
        """Count a file that is not used, and name it; with a reason it was tried."""
        self.dropped[kind] += 1
        if len(self.skipped_files) < LISTED:
            self.skipped_files.append(printable_path(path))
        if reason:
            self.name(reason)

    def name(self, reason: str) -> None:
        """Say what could not be read."""
        if len(self.unreadable) < LISTED:
            logger.warning("%s", reason)
            self.unreadable.append(reason)

    def report(self) -> ReadReport:
        """The counts so far."""
        values = {name: getattr(self, name) for name in ReadReport.__dataclass_fields__}
        return ReadReport(**{n: dict(v) if isinstance(v, Counter) else v for n, v in values.items()})


def printable_path(path: Path) -> str:
    """A path as text: a file name need not be UTF-8 on Linux, an Arrow string must be."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def document_lines(counts: dict[str, Any]) -> Iterator[str]:
    """What became of the documents (the counts of `prepared_documents`), for a screen."""
    for name in ("read", "read_heldout"):
        yield from _report_lines(counts.get(name) or {})
    languages = counts.get("corpus", {}).get("languages", {})
    if languages and counts.get("read", {}).get("files"):
        total = max(1, sum(languages.values()))
        yield "languages          " + ", ".join(f"{code} {number / total:.0%}" for code, number in languages.items())
    if personal := counts.get("personal_data"):
        amounts = _amounts(personal["found"]) or "none"
        yield f"personal data      {amounts}; not counted: {personal['not_counted']}"
    if (near := counts.get("near_duplicates", {})) and near["clusters"]:
        left = near["dropped"] + near["dropped_because_held_out"]
        what = f"{near['documents']:,} documents in {near['clusters']:,} groups, for example {near['largest'][:2]}"
        yield f"near duplicates    {what}; {left:,} left the corpus, none are on both sides of held-out documents"


def _report_lines(read: dict[str, Any]) -> Iterator[str]:
    if not read.get("files"):
        return
    yield f"read {read['files']:,} files: {read['documents']:,} documents, {read['characters']:,} characters"
    if read.get("rows"):
        used = ", ".join(read["columns_used"])
        yield f"  of {read['rows']:,} rows the column {used or '(none)'} is the text{_not_used(read)}"
    if read.get("pages"):
        without = read["pages_without_text"]
        yield f"  {read['pages']:,} pages of PDF, {without:,} of them without text" + (" (images)" if without else "")
    if removed := _amounts(read.get("removed")):
        share = sum(read["removed"].values()) / max(1, read["visible"])
        yield f"  left out, {share:.1%} of {read['visible']:,} visible characters: {removed}"
    if cleaned := _amounts(read.get("cleaned")):
        yield f"  characters removed by cleaning: {cleaned}"
    if read.get("undecoded"):
        yield f"  {read['undecoded']:,} characters could not be decoded (U+FFFD)"
    for what in ("unreadable", "notes"):
        listed = read.get(what) or []
        yield from (f"  {line}" for line in listed[:SHOWN])
        if len(listed) > SHOWN:
            yield f"  and more of this kind: {what} in the manifest"


def _amounts(counted: dict[str, int] | None) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in (counted or {}).items() if number)


def _not_used(read: dict[str, Any]) -> str:
    names = [name for name, _ in Counter(read.get("columns_not_used", {})).most_common(8)]
    return f"; not used: {', '.join(names)}" if names else ""
