"""Rows of JSON: an object a line, or a list of them, whatever the file is called."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.data.tabular.text_lines import Complain, PlacedRow, first_text, lines, say_nothing, whole_text

_BLANKS = re.compile(r"\s*")


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
    if first.startswith("{") and _is_json(first) and _has_more_lines(path):
        yield from _line_by_line(path, complain)
        return
    try:
        value = _parsed(whole_text(path, complain) or "[]")
    except _RepeatedKeyError as error:
        complain(f"{path}: the key {str(error)!r} twice in one object", fix="keep one of them")
        return
    except (ValueError, RecursionError) as error:
        if (objects := _one_after_the_other(whole_text(path, say_nothing))) is not None:
            for number, item in enumerate(objects, 1):
                yield from _checked(f"{path}, row {number}", number, item, complain)
            return
        # in a list, or an object over many lines, one slip would make every line a complaint
        if first.startswith("{") and first != "{":
            yield from _line_by_line(path, complain)
        else:
            fix = "write a JSON list of objects, or one object per line"
            complain(f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON: {error}", fix=fix)
        return
    for number, item in enumerate(value if isinstance(value, list) else _rows_of(value), 1):
        yield from _checked(f"{path}, row {number}", number, item, complain)


def _rows_of(value: Any) -> list[Any]:
    """The rows of one object: of pandas' `to_json` in its forms, of columns as lists, of rows under their names."""
    if not isinstance(value, dict) or len(value) < 2:
        return [value]
    inside = list(value.values())
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(map(str, names), row, strict=False)) for row in data]
    are_columns = all(isinstance(column, list) and len(column) == len(inside[0]) for column in inside)
    if are_columns and not any(isinstance(item, dict) for column in inside for item in column):
        return [dict(zip(value, row, strict=True)) for row in zip(*inside, strict=True)]
    if not all(isinstance(item, dict) and item.keys() == inside[0].keys() for item in inside):
        return [value]
    if all(str(key).isdigit() for key in inside[0]):
        return [{name: column[key] for name, column in value.items()} for key in inside[0]]
    return [{"id": name, **row} for name, row in value.items()] if len(inside[0]) > 1 else [value]


def _one_after_the_other(text: str) -> list[Any] | None:
    """The objects of a text that holds several over many lines, as jq writes them; None for any other text."""
    decoder, values = json.JSONDecoder(object_pairs_hook=_without_repeats), list[Any]()
    text = text.strip()
    at = 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
            at = _BLANKS.match(text, at).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return None
    return values if len(values) > 1 and all(isinstance(value, dict) for value in values) else None


def _line_by_line(path: Path, complain: Complain) -> Iterator[PlacedRow]:
    for number, line in lines(path, complain):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            # a comma behind a line is left over from a list
            value = _parsed(line.strip().removesuffix(","))
        except _RepeatedKeyError as error:
            complain(f"{place}: the key {str(error)!r} twice in one object", line.strip(), "keep one of them")
            continue
        except (ValueError, RecursionError) as error:
            end = "" if line.endswith("\n") else "; the file ends inside this line, so it may be truncated"
            complain(f"{place}: not valid JSON: {error}{end}", line.strip(), "write one JSON object per line")
            continue
        # half of a surrogate pair can only come out of an escape
        yield from _checked(place, number, value, complain, may_be_broken="\\u" in line)


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return mapping


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _has_more_lines(path: Path) -> bool:
    return len(list(itertools.islice((text for _, text in lines(path, say_nothing) if text.strip()), 2))) > 1


def _is_list_of_values(line: str) -> bool:
    """Whether a line is a whole list of something else than objects: a row written without column names."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and not all(isinstance(item, dict) for item in value)


def _checked(
    place: str, number: int, value: object, complain: Complain, *, may_be_broken: bool = True
) -> Iterator[PlacedRow]:
    if not isinstance(value, dict):
        complain(f"{place}: a {type(value).__name__}, not an object", value, 'write {"column": value, ...}')
        return
    try:
        if may_be_broken:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        fix = r"a \ud800-\udfff escape stands alone: write both halves, or the character itself"
        complain(f"{place}: half of a surrogate pair, which no UTF-8 text can hold", fix=fix)
        return
    yield place, number, value
