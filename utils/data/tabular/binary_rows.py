"""Rows of parquet files and of workbooks (xlsx, xls, xlsb, ods)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.data.tabular.text_lines import ABOVE, SAMPLE, Complain, PlacedRow, rows_above
from utils.logger import warning


def parquet_rows(path: Path, complain: Complain) -> Iterator[PlacedRow]:
    """The rows in batches of 200."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=200):
                for values in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", number, values
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        complain(f"{path}: not readable as parquet after row {number}", str(error), "write the file again")


def workbook_rows(path: Path, complain: Complain) -> Iterator[PlacedRow]:
    """The rows of the one sheet that holds any, under its first row. Several filled sheets have to have one header."""
    from python_calamine import CalamineError, CalamineWorkbook

    try:
        with CalamineWorkbook.from_path(str(path)) as book:
            sheets = [(name, book.get_sheet_by_name(name).to_python()) for name in book.sheet_names]
    except (CalamineError, ValueError, OSError) as error:
        complain(f"{path}: not readable as a workbook", str(error), "save it again, as xlsx without a password")
        return
    filled = [(name, [row for row in rows if any(cell != "" for cell in row)]) for name, rows in sheets]
    filled = [(name, rows) for name, rows in filled if rows]
    for at, (name, rows) in enumerate(filled):
        if above := rows_above(rows[:SAMPLE]):
            warning(ABOVE, path=f"{path}, {name}", rows=above)
            filled[at] = (name, rows[above:])
    headers = {tuple(str(cell).strip() for cell in rows[0]) for _, rows in filled}
    if len(headers) > 1:
        names = [name for name, _ in filled]
        fix = "save the sheet with the pairs as a file of its own"
        complain(f"{path}: {len(filled)} sheets with different columns", names, fix)
        return
    for name, rows in filled:
        header = [str(cell).strip() for cell in rows[0]]
        if repeated := sorted(column for column, times in Counter(header).items() if column and times > 1):
            complain(f"{path}, {name}: a column name twice", repeated, "rename the columns in the first row")
            return
        for number, row in enumerate(rows[1:], 2):
            named = dict(zip(header, map(_cell, row), strict=True))
            yield f"{path}, {name}, row {number}", number, {column: value for column, value in named.items() if column}


def _cell(value: Any) -> Any:
    """Numbers come as floats, dates as objects."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (str, int, float)) else None if value is None else str(value)
