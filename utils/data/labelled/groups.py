"""Which document each pair was written from: what splits train, dev and test, and which file of the corpus it is.

Pure. A column is taken by its name and by what stands in it, and each choice comes with its reason: the name of a data
set in `source` is no document, and neither is what most rows share.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from utils.data.labelled.column_roles import ColumnMap

Names = Mapping[str, str]
# what stands behind the page of a web site, or the name of a file, is a place in it; a row of a table is no place
_PLACE_IN_PAGE = re.compile(r"(?P<page>\S+://[^#\s]+|[^#]+\.(?:html?|pdf|md|docx?|rst|txt|epub))#[^/]*", re.IGNORECASE)
STRONG = ("document", "doc_id", "document_id", "docid", "doc", "group", "group_id", "source_document", "source_doc")
FILES = ("file", "file_name", "filename", "file_path", "filepath", "source_file", "path", "url", "source_url", "link")
FILES += ("uri", "page_url", "quelle", "dokument", "datei", "dateiname", "fichier", "fuente", "archivo", "文档", "文書")
NAMED = (*STRONG, *FILES, "title", "document_title", "source")
HEADINGS = ("section", "heading", "chapter", "section_title", "subsection", "page")
SOURCES = ("source", "source_file", *FILES, *STRONG, "title", "document_title")
CANDIDATES = tuple(dict.fromkeys((*NAMED, *HEADINGS)))
# in fewer rows than this a value that holds most of them says nothing
FEW_ROWS = 10
# `source` with so few values, each in so many rows, names collections
FEW_VALUES, MANY_ROWS = 10, 10


@dataclass
class Groups:
    """`documents` is the group of each pair; `columns` and `refused` are column -> why."""

    documents: list[str] = field(default_factory=list)
    taken: list[set[str]] = field(default_factory=list)
    """Of each pair the columns that its document was read from."""
    without: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    most: str = ""
    """Says of a column that names documents that one of them holds most rows: no split by it is fair."""

    def to_json(self) -> dict[str, Any]:
        """The facts for a manifest and the screen."""
        return {"document": self.columns, "not_document": self.refused, "pairs_without_document": self.without}


def group(pairs: Sequence[Names], ids: Sequence[str], contexts: Sequence[str | None], column_map: ColumnMap) -> Groups:
    """The document of each pair: its column's value, else that of the first pair with the same context, else its id."""
    groups = Groups()
    pairs = [{column: _page(name) for column, name in names.items()} for names in pairs]
    mapped = column_map.columns.get("document", [])
    for column in mapped or NAMED:
        values = Counter(names[column] for names in pairs if names.get(column))
        if not values:
            continue
        why = "named by --data.columns" if mapped else "its name" if column not in FILES else "it names files or pages"
        top, count = values.most_common(1)[0]
        is_most = len(pairs) >= FEW_ROWS and 2 * count > len(pairs)
        if is_most and (headed := _headings(pairs, column)):
            groups.columns[column] = f"{why}, with `{headed}`, because {top!r} holds {count:,} of {len(pairs):,} rows"
        elif is_most and (mapped or column in STRONG):
            groups.columns[column] = why
            groups.most = f"`{column}`: {top!r} holds {count:,} of {len(pairs):,} rows"
        elif is_most:
            groups.refused[column] = f"{top!r} holds {count:,} of {len(pairs):,} rows"
        elif column == "source" and not mapped and _are_collections(values):
            per = sum(values.values()) // len(values)
            groups.refused[column] = f"{len(values)} values of about {per:,} rows each are collections, not documents"
        else:
            groups.columns[column] = why
    alike = Counter(context for context in contexts if context)
    for context, count in alike.most_common(1):
        if len(pairs) >= FEW_ROWS and 2 * count > len(pairs):  # what is said to all of them is no document of any
            groups.refused["context"] = f"the same one stands in {count:,} of {len(pairs):,} rows"
            contexts = [None if one == context else one for one in contexts]
    first_with: dict[str, str] = {}
    divided = {column: _headings(pairs, column) for column, why in groups.columns.items() if "with `" in why}
    for names, name, context in zip(pairs, ids, contexts, strict=True):
        column = next((column for column in groups.columns if names.get(column)), None)
        if column is None:
            groups.without += 1
            groups.taken.append(set())
            groups.documents.append(first_with.setdefault(context, name) if context else name)
        else:
            headed = divided.get(column) or ""
            heading = names.get(headed, "")
            groups.taken.append({column, headed})
            groups.documents.append(f"{names[column]} > {heading}" if heading else names[column])
    read = set().union(*groups.taken)
    groups.columns = {column: why for column, why in groups.columns.items() if column in read}
    return groups


def find_sources(
    pairs: Sequence[Names], column_map: ColumnMap, corpus: Callable[[Collection[str]], set[str]] | None
) -> tuple[str | None, list[str | None]]:
    """(column, its value for each pair) that names the files of the corpus; (None, ...) where no column does.

    `corpus` tells which of some names are documents of the corpus; None where there is none to look in.
    """
    mapped = column_map.columns.get("source")
    best: tuple[int, str | None] = (0, mapped[0] if mapped else None)
    values = {names[column] for column in mapped or SOURCES for names in pairs if names.get(column)}
    known = corpus({spelled for value in values for spelled in spellings(value)}) if corpus and values else set()
    for column in mapped or SOURCES:
        hits = sum(not known.isdisjoint(spellings(names[column])) for names in pairs if names.get(column))
        if hits > best[0]:
            best = (hits, column)
    column = best[1]
    return column, [names.get(column) or None if column else None for names in pairs]


def spellings(name: str) -> set[str]:
    """Names under which a file may be known: "a/b.pdf" is also "b.pdf" and "b"."""
    path = PurePosixPath(name)
    return {name, path.name, path.stem} if path.name else {name}


def _page(name: str) -> str:
    """The page or file that a name stands for, without the place in it: "a.html#top" is "a.html"."""
    match = _PLACE_IN_PAGE.fullmatch(name)
    return match["page"] if match else name


def _are_collections(values: Counter[str]) -> bool:
    looks_like_files = sum("/" in value or PurePosixPath(value).suffix != "" for value in values) * 2 > len(values)
    many = sum(values.values()) >= MANY_ROWS * len(values)
    return len(values) <= FEW_VALUES and many and not looks_like_files


def _headings(pairs: Sequence[Names], column: str) -> str | None:
    """The column of headings that divides the document which holds most rows, so that none of its parts does."""
    for heading in HEADINGS:
        if heading == column:
            continue
        values = Counter((names.get(column), names.get(heading)) for names in pairs)
        if any(names.get(heading) for names in pairs) and 2 * values.most_common(1)[0][1] <= len(pairs):
            return heading
    return None
