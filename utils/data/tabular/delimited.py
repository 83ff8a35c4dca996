"""Rows of csv and its dialects: comma, semicolon, tab or bar, `sep=` in the first line, old Mac line ends."""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.data.tabular.text_lines import ABOVE, SAMPLE, Complain, PlacedRow, lines, rows_above
from utils.logger import warning

DELIMITERS = (",", ";", "\t", "|")
_SEPARATOR = re.compile(r"\s*\"?sep=(?P<mark>.)\"?\s*", re.IGNORECASE)
_LONE_RETURN = re.compile(r"(?<=\r)(?!\n)")


def delimited_rows(path: Path, complain: Complain) -> Iterator[PlacedRow]:
    """The rows under a line of column names."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell above 128 KiB, and a document is easily longer
    texts = (piece for _, text in lines(path, complain) for piece in _LONE_RETURN.split(text) if piece)
    sample = list(itertools.islice(texts, SAMPLE))
    skipped = 0
    if sample and (separator := _SEPARATOR.fullmatch(sample[0])):
        delimiter, sample, skipped = separator["mark"], sample[1:], 1
    else:
        delimiter = ""
    read = functools.cache(functools.partial(_read, sample))  # a sample may be one line of 100 MB
    delimiter = delimiter or ("\t" if ".tsv" in path.suffixes else _delimiter(read))
    above = rows_above([row for row in read(delimiter) if row])
    if above:
        warning(ABOVE, path=str(path), rows=above)
    reader = csv.reader(itertools.chain(sample, texts), delimiter=delimiter, strict=True)
    kind = "TSV" if delimiter == "\t" and ".tsv" in path.suffixes else "CSV"
    header: list[str] = []
    while True:
        number = reader.line_num + 1 + skipped
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = 'put a cell that holds a quote or a line break between "", and double the quotes inside it'
            complain(f"{path}:{number}: not valid {kind}: {error}", fix=fix)
            return
        if not cells or (header and not any(cell.strip() for cell in cells)):
            continue
        if above:
            above -= 1
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            if repeated := sorted(name for name, times in Counter(header).items() if name and times > 1):
                complain(f"{path}:{number}: a column name twice", repeated, "rename the columns in the first line")
        elif len(cells) != len(header):
            what = f"{path}:{number}: {len(cells)} cells, but the first line names {len(header)} columns"
            complain(what, delimiter.join(cells), f"quote a cell that contains {delimiter!r}")
        else:
            yield f"{path}:{number}", number, dict(zip(header, cells, strict=True))


def _delimiter(read: Callable[[str], list[list[str]]]) -> str:
    """The delimiter with which the first rows have as many cells as there are names; a comma where none fits."""
    for exact in (True, False):
        for delimiter in DELIMITERS:
            rows = read(delimiter)
            sizes = [len(row) for row in rows if row]
            if sizes and sizes[0] > 1 and (not exact or set(sizes) == {sizes[0]}):
                return delimiter
    return ","


def _read(sample: list[str], delimiter: str) -> list[list[str]]:
    """The sample's rows; the last one, which may be cut, is left out where others are there."""
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # what was read until there tells
        rows.extend(csv.reader(sample, delimiter=delimiter, strict=True))
    return rows[:-1] if len(sample) == SAMPLE and len(rows) > 2 else rows
