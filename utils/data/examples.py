"""Labelled question-answer examples for the task adapter, whatever shape they are kept in, in one common form.

Reads what `--data.task` names (one table or hub dataset), writes nothing. The common form:

    {"id": str, "document": str, "system": str | None, "history": [{"role", "content"}], "question": str,
     "context": str | None, "reasoning": str | None, "answers": [str, ...], "choices": [str, ...] | None,
     "answer_index": int | None}

`document` is what the row was written from; rows of one document never end up on both sides of a split.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.data.example_formats import RowError, UnanswerableError, to_common
from utils.data.tables import (
    LONGEST_DOCUMENT,
    TABLE_SUFFIXES,
    ProblemList,
    TableRow,
    UniqueIds,
    is_hub_id,
    iter_hub_rows,
    iter_rows,
)
from utils.exceptions import DataError, Problem

DOCUMENT_COLUMNS = ("document", "doc_id", "title", "source")
# a csv cell is always text; in these columns text that looks like JSON is JSON
JSON_COLUMNS = ("answers", "choices", "messages", "conversations", "history")


@dataclass(frozen=True)
class TaskReport:
    """What was read: rows seen, examples kept, reason -> number dropped, and the shape or shapes found."""

    rows: int
    examples: int
    dropped: dict[str, int]
    shape: str
    rows_without_document: int
    """Examples that stand for a document of their own, because no column says what they were written from."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain values for a manifest."""
        return asdict(self)


def read_task_examples(
    source: str, *, cache_dir: Path, hub_revision: str | None = None, split: str | None = None
) -> tuple[list[dict[str, Any]], TaskReport]:
    """Read a jsonl, json, csv, tsv or parquet file, or a hub dataset pinned by `hub_revision`, into the common form.

    `split` names a split of a hub dataset; a file has none. Exact duplicates (same history, question, context, answers)
    and SQuAD's unanswerable questions are dropped and counted. In chats the last assistant turn is the answer, and what
    follows it is cut. Raises DataError with every problem by file and line: a source that does not exist or is not a
    table, a malformed line, an unknown shape (with the columns found), a row without question, without answers, with an
    empty answer, with fewer than 2 choices or a wrong answer_index, and a file that gives no examples at all.
    """
    problems, dropped, shapes = ProblemList(), Counter(), Counter()
    ids, seen, complained = UniqueIds(), set(), set()
    examples: list[dict[str, Any]] = []
    rows = rows_without_document = 0
    for row in _rows_of(source, Path(cache_dir), hub_revision, split, problems):
        rows += 1
        columns = {str(name).strip().lower(): value for name, value in row.values.items()}
        try:
            shape, fields = to_common(_parse_cells(columns) if _is_text_table(source) else columns)
        except UnanswerableError:
            dropped["unanswerable"] += 1
            continue
        except RowError as error:
            # the same foreign columns in 10,000 rows are one mistake
            if error.what != "unknown shape" or tuple(columns) not in complained:
                problems.add(f"{row.place}: {error.what}", error.value, error.fix)
            complained.add(tuple(columns))
            continue
        shapes[shape] += 1
        if (size := len(json.dumps(fields, ensure_ascii=False))) > LONGEST_DOCUMENT:
            problems.add(f"{row.place}: an example of {size:,} characters", fix="no model reads that much: shorten it")
            continue
        key = json.dumps([fields[name] for name in ("history", "question", "context", "answers")])
        if key in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(key)
        wanted_id = _name(columns.get("id")) or f"{_label(source)}#{row.number}"
        document = next((name for column in DOCUMENT_COLUMNS if (name := _name(columns.get(column)))), None)
        rows_without_document += document is None
        examples.append({"id": ids.claim(wanted_id), "document": document or wanted_id, **fields})
    problems.raise_if_any()
    if not examples:
        what = f"{source}: no examples: {rows} rows read, dropped: {dict(dropped) or 'nothing'}"
        raise DataError(Problem(what, fix="write one labelled question per row"))
    return examples, TaskReport(rows, len(examples), dict(dropped), " + ".join(shapes), rows_without_document)


def _rows_of(
    source: str, cache_dir: Path, hub_revision: str | None, split: str | None, problems: ProblemList
) -> Iterator[TableRow]:
    path = Path(source).expanduser()
    suffixes = " ".join(TABLE_SUFFIXES)
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        if split is not None:
            problems.add(
                f"{source}: a file has no splits", split, "leave the split out, or name the file of that split"
            )
        yield from iter_rows(path, problems)
    elif path.is_file():
        problems.add(f"{source}: not a table", path.suffix, f"convert it to one of {suffixes}")
    elif path.is_dir():
        problems.add(f"{source!r} is a folder", fix=f"name the file in it that holds the examples: {suffixes}")
    elif is_hub_id(source):
        yield from iter_hub_rows(source, hub_revision, split=split, cache_dir=cache_dir, problems=problems)
    else:
        problems.add(f"{source!r} does not exist", str(Path.cwd()), "correct the path; it starts at the current folder")


def _is_text_table(source: str) -> bool:
    return Path(source).suffix.lower() in (".csv", ".tsv")


def _parse_cells(columns: dict[str, Any]) -> dict[str, Any]:
    parsed = {name: None if value == "" and name != "answer" else value for name, value in columns.items()}
    for name in JSON_COLUMNS:
        cell = str(parsed.get(name) or "").strip()
        if cell.startswith(("[", "{")):
            try:
                parsed[name] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                fix = 'write a JSON list: ["first", "second"]'
                raise RowError(f"the cell in `{name}` begins like JSON but is not: {error}", cell, fix) from error
    return parsed


def _label(source: str) -> str:
    return Path(source).name if Path(source).is_file() else source


def _name(value: object) -> str | None:
    # an object in `source` or `title` is metadata of another kind, not a name
    return str(value).strip() or None if isinstance(value, (str, int)) and not isinstance(value, bool) else None
