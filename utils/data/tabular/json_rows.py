"""Rows of JSON: an object a line, or a list of them, whatever the file is called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.data.tabular.text_lines import Complain, PlacedRow, first_text, lines, whole_text


class _RepeatedKeyError(ValueError):
    """A key twice in one object; the message is the key."""


def jsonl_rows(path: Path, complain: Complain) -> Iterator[PlacedRow]:
    """An object a line. A file that begins as a list, or as one object over many lines, is read as that."""
    first = first_text(path)
    if first == "{" or (first.startswith("[") and not _is_list_of_values(first)):
        yield from json_rows(path, complain)
        return
    yield from _line_by_line(path, complain)


def json_rows(path: Path, complain: Complain) -> Iterator[PlacedRow]:
    """A list of objects, one object, or an object a line."""
    first = first_text(path)
    if first.startswith("{") and _is_json(first):
        yield from _line_by_line(path, complain)
        return
    try:
        value = _parsed(whole_text(path, complain) or "[]")
    except _RepeatedKeyError as error:
        complain(f"{path}: the key {str(error)!r} twice in one object", fix="keep one of them")
        return
    except (ValueError, RecursionError) as error:
        # in a list, or an object over many lines, one slip would make every line a complaint
        if first.startswith("{") and first != "{":
            yield from _line_by_line(path, complain)
        else:
            fix = "write a JSON list of objects, or one object per line"
            complain(f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON: {error}", fix=fix)
        return
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield from _checked(f"{path}, row {number}", number, item, complain)


def _line_by_line(path: Path, complain: Complain) -> Iterator[PlacedRow]:
    for number, line in lines(path, complain):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = _parsed(line)
        except _RepeatedKeyError as error:
            complain(f"{place}: the key {str(error)!r} twice in one object", line.strip(), "keep one of them")
            continue
        except (ValueError, RecursionError) as error:
            end = "" if line.endswith("\n") else "; the file ends inside this line, so it may be truncated"
            complain(f"{place}: not valid JSON: {error}{end}", line.strip(), "write one JSON object per line")
            continue
        yield from _checked(place, number, value, complain)


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_list_of_values(line: str) -> bool:
    """Whether a line is a whole list of something else than objects: a row written without column names."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and not all(isinstance(item, dict) for item in value)


def _checked(place: str, number: int, value: object, complain: Complain) -> Iterator[PlacedRow]:
    if not isinstance(value, dict):
        complain(f"{place}: a {type(value).__name__}, not an object", value, 'write {"column": value, ...}')
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        fix = r"a \ud800-\udfff escape stands alone: write both halves, or the character itself"
        complain(f"{place}: half of a surrogate pair, which no UTF-8 text can hold", fix=fix)
        return
    yield place, number, value
