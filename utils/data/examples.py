"""Labelled question-answer examples for the task adapter, whatever shape they are kept in, in one common form.

Reads what `--data.task` names (one table or hub dataset), writes nothing. The common form:

    {"id": str, "document": str, "system": str | None, "history": [{"role", "content"}], "question": str,
     "context": str | None, "reasoning": str | None, "answers": [str, ...], "choices": [str, ...] | None,
     "answer_index": int | None}

and where there is something to say: `source` (the file of the corpus), `tools`, `tool_turns` (calls and results between
question and answer) and `tool_calls` (of the answer). `document` is what the row was written from; rows of one document
never end up on both sides of a split.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.data.example_formats import LeftOutError, Read, RowError, expand, read_row
from utils.data.labelled import groups, marks
from utils.data.labelled.column_roles import ColumnMap, column_name
from utils.data.labelled.file_look import look_at_file
from utils.data.labelled.report import TaskReport
from utils.data.labelled.row_text import CONTROLS, is_missing
from utils.data.tables import (
    LONGEST_DOCUMENT,
    PAIR_SUFFIXES,
    ProblemList,
    TableRow,
    UniqueIds,
    is_hub_id,
    is_text_table,
    iter_hub_rows,
    iter_rows,
    table_suffix,
)
from utils.exceptions import DataError, Problem, path_fix

__all__ = ["TaskReport", "read_task_examples"]

# a csv cell is always text; in these columns text that looks like JSON is JSON
JSON_COLUMNS = ("answers", "choices", "options", "messages", "conversations", "history", "tools", "contexts")


@dataclass
class _Kept:
    """A row that was read, until the whole file is known."""

    place: str
    number: int
    id: str | None
    names: dict[str, str]
    read: Read


def read_task_examples(
    source: str,
    *,
    cache_dir: Path,
    hub_revision: str | None = None,
    split: str | None = None,
    columns: Sequence[str] = (),
    corpus: Callable[[Collection[str]], set[str]] | None = None,
) -> tuple[list[dict[str, Any]], TaskReport]:
    """Read a table (jsonl, json, csv, tsv, parquet, a workbook) or a hub dataset pinned by `hub_revision`.

    `split` names a split of a hub dataset; a file has none. `columns` is `--data.columns`; `corpus` tells which of some
    names are documents of the corpus. Rows that are left out (exact duplicates of all that a row says, unanswerable
    questions, rows marked as not to be trained, pictures) are counted by reason. Raises DataError with every problem by
    file and line: a source that does not exist or is not a table, a malformed line, an unknown shape (with the columns
    found and the flag that maps them), a row without question or answer, bad choices, a file that gives no examples.
    """
    problems, column_map = ProblemList(), ColumnMap(columns)
    dropped, notes, seen = Counter[str](), Counter[str](), Counter[str]()
    kept: list[_Kept] = []
    complained: set[tuple[str, ...]] = set()
    rows = 0
    for row in _rows_of(source, Path(cache_dir), hub_revision, split, problems):
        for place, values in expand(row.values):
            rows += 1
            place, number = f"{row.place}{place}", rows if place else row.number
            seen.update(column_name(name) for name, value in values.items() if not is_missing(value))
            if all(is_missing(value) for value in values.values()):
                dropped["blank row"] += 1
                continue
            try:
                read = read_row(_parse_cells(values, is_text_table(source)), column_map)
                if (size := len(json.dumps(read.fields, ensure_ascii=False))) > LONGEST_DOCUMENT:
                    raise RowError(f"an example of {size:,} characters", fix="no model reads that much: shorten it")
            except LeftOutError as error:
                dropped[error.reason] += 1
                continue
            except RowError as error:
                # the same unknown columns in 10,000 rows are one mistake
                if not error.of_file or (error.what, *values) not in complained:
                    problems.add(f"{place}: {error.what}", error.value, error.fix)
                complained.add((error.what, *values))
                continue
            notes.update(dict.fromkeys(read.notes, 1))
            if controls := sum(len(CONTROLS.findall(text)) for text in _texts(values)):
                notes["control character taken out, or read as the cp1252 character it was"] += controls
            names = {column_name(name): text for name, value in values.items() if (text := _name(value))}
            name_columns = (
                *groups.CANDIDATES,
                *column_map.columns.get("document", ()),
                *column_map.columns.get("source", ()),
            )
            identity = names.get(column_map.columns.get("id", ["id"])[0])
            kept.append(_Kept(place, number, identity, {n: names[n] for n in name_columns if n in names}, read))
    if rows and (missing := column_map.missing(seen)):
        fix = f"its columns are {', '.join(seen)}"
        problems.add(f"{source}: --data.columns names a column that is in no row", missing, fix)
    kept = _by_label(kept, dropped)
    _number_choices(source, kept, problems)
    look_at_file(source, [(one.place, one.read) for one in kept], notes, problems)
    problems.raise_if_any()
    examples = _examples(source, kept, dropped)
    grouping = groups.group(
        [one.names for _, one in examples],
        [example["document"] for example, _ in examples],
        [example["context"] for example, _ in examples],
        column_map,
    )
    column, sources = groups.find_sources([one.names for _, one in examples], column_map, corpus)
    labelled = []
    for (example, _), document, file in zip(examples, grouping.documents, sources, strict=True):
        own = {"source": file} if file and file != document else {}
        labelled.append({**example, "document": document, **own})
    if not labelled:
        left = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items()) or "nothing"
        raise DataError(Problem(f"{source}: no examples: {rows} rows read, dropped: {left}", fix=_FIX_EMPTY))
    facts = grouping.to_json() | ({"most": grouping.most} if grouping.most else {})
    if column:
        facts |= {"source": column, "why_source": "named by --data.columns" if "source" in column_map.columns else _WHY}
    report = TaskReport(
        rows,
        len(labelled),
        dict(dropped),
        " + ".join(dict.fromkeys(one.read.shape for _, one in examples)),
        grouping.without,
        *_columns(
            [(one, taken | {column or ""}) for (_, one), taken in zip(examples, grouping.taken, strict=True)],
            column_map,
        ),
        dict(notes),
        facts,
        _turns(labelled),
    )
    return labelled, report


_FIX_EMPTY = "write one labelled question per row"
_WHY = "its values are names of the corpus's files"


def _examples(source: str, kept: list[_Kept], dropped: Counter[str]) -> list[tuple[dict[str, Any], _Kept]]:
    """The kept rows without exact duplicates, with ids of their own."""
    ids, seen = UniqueIds(), set[str]()
    examples = []
    for one in kept:
        key = json.dumps(one.read.fields, sort_keys=True)
        if key in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(key)
        name = ids.claim(one.id or f"{_label(source)}#{one.number}")
        examples.append(({"id": name, "document": one.id or name, **one.read.fields}, one))
    return examples


def _by_label(kept: list[_Kept], dropped: Counter[str]) -> list[_Kept]:
    """Without the rows labelled 0, where the column `label` holds 0 and 1 alone: WikiQA's wrong answers, KTO's."""
    is_mark = not any("label" in one.read.unused and one.read.label is None for one in kept)
    wrong = [one for one in kept if is_mark and one.read.label is False]
    dropped.update({marks.FALSE_LABEL: len(wrong)} if wrong else {})
    for one in kept:
        if is_mark and one.read.label is not None:
            one.read.used["label"] = "mark"
    left_out = {id(one) for one in wrong}
    return [one for one in kept if id(one) not in left_out]


def _number_choices(source: str, kept: list[_Kept], problems: ProblemList) -> None:
    """Settle whether the numbers of the right choices count from 0 or from 1: a 0, or a last one, shows it."""
    unsure = [(one, *one.read.unsure) for one in kept if one.read.unsure]
    if not unsure:
        return
    from_zero, from_one = any(n == 0 for _, n, _ in unsure), any(n == size for _, n, size in unsure)
    if from_zero == from_one:
        numbers = sorted({number for _, number, _ in unsure})
        fix = "say which: --data.columns answer_index=COLUMN (from 0), or answer_number=COLUMN (from 1)"
        problems.add(f"{source}: the right choices are numbers that may count from 0 or from 1", numbers, fix)
        return
    for one, number, _ in unsure:
        index = number - from_one
        one.read.fields.update(answers=[one.read.fields["choices"][index]], answer_index=index)


def _columns(
    kept: list[tuple[_Kept, set[str]]], column_map: ColumnMap
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Role -> column -> rows, and column -> rows of what was not read; each row with its document's columns."""
    roles: dict[str, Counter[str]] = {}
    unused = Counter[str]()
    for one, taken in kept:
        for column, role in one.read.used.items():
            roles.setdefault(role, Counter())[column] += 1
        own = {*taken, *column_map.ignored, *([column_map.columns.get("id", ["id"])[0]] if one.id else [])}
        unused.update(c for c in one.read.unused if c not in own and c not in one.read.used)
    ignored = {column: sum(column in one.read.unused for one, _ in kept) for column in sorted(column_map.ignored)}
    counts = {role: dict(columns) for role, columns in roles.items()}
    return counts | ({"ignored": ignored} if ignored else {}), dict(unused)


def _turns(examples: list[dict[str, Any]]) -> dict[str, int]:
    """Earlier assistant turns: trained are those that answer a user and carry no mark."""
    counted = Counter[str](trained=0, context=0)
    for example in examples:
        turns = [*example["history"], {"role": "user"}, *example.get("tool_turns", [])]
        for at, turn in enumerate(turns):
            if turn["role"] == "assistant":
                is_answer = any(one["role"] == "user" for one in turns[:at]) and turns[at - 1]["role"] != "assistant"
                counted["trained" if is_answer and not turn.get("untrained") else "context"] += 1
    return dict(counted)


def _rows_of(
    source: str, cache_dir: Path, hub_revision: str | None, split: str | None, problems: ProblemList
) -> Iterator[TableRow]:
    path = Path(source).expanduser()
    suffixes = " ".join(PAIR_SUFFIXES)
    if path.is_file() and table_suffix(path) in PAIR_SUFFIXES:
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
        problems.add(f"{source!r} does not exist", fix=path_fix(source))


def _parse_cells(values: dict[str, Any], is_text: bool) -> dict[str, Any]:
    """The row with what is JSON in a cell of a table of text read as that; elsewhere a text stays one."""
    if not is_text:
        return values
    parsed = dict(values)
    for name, value in values.items():
        cell = str(value or "").strip()
        if column_name(name) in JSON_COLUMNS and cell.startswith(("[", "{")):
            try:
                parsed[name] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                try:  # pandas writes lists as Python does
                    parsed[name] = ast.literal_eval(cell)
                except (ValueError, SyntaxError, MemoryError, RecursionError):
                    fix = 'write a JSON list: ["first", "second"]'
                    what = f"the cell in `{name}` begins like JSON but is not: {error}"
                    raise RowError(what, cell, fix) from error
    return parsed


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _label(source: str) -> str:
    return Path(source).name if Path(source).is_file() else source


def _name(value: object) -> str | None:
    # an object in `source` or `title` is metadata of another kind, not a name
    return str(value).strip() or None if isinstance(value, (str, int)) and not isinstance(value, bool) else None
