"""Documents out of the rows of a table: one column is the text, the others are named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from utils.data.corpus.first_look import LookAhead
from utils.data.corpus.read_report import ReadTally
from utils.data.extraction.cleaning import cleaned
from utils.data.extraction.formats import SPLIT
from utils.data.extraction.text_decoding import MARK
from utils.data.tables import LONGEST_DOCUMENT, ProblemList, TableRow

TEXT_COLUMNS = ("text", "content", "contents", "body", "document", "article", "passage", "page_content", "markdown")
NO_COLUMN = "rows without a text column"
NOT_UTF8_ROW = "rows that are not UTF-8"


def text_rows(
    rows: Iterable[TableRow], label: str, problems: ProblemList, tally: ReadTally, look: LookAhead
) -> Iterator[dict[str, str]]:
    """The documents of a table or hub dataset, clean and distinct; what is wrong goes into `problems`."""
    used: set[Any] = set()
    has_complained = False
    for row in rows:
        tally.rows += 1
        column = text_column(row.values)
        if column is None:
            tally.dropped[NO_COLUMN] += 1
            if not has_complained:  # the other rows of the table most likely lack it too
                fix = f"name the column with the text 'text' (also read: {', '.join(TEXT_COLUMNS[1:])})"
                problems.add(f"{row.place}: no text column", f"columns {', '.join(map(str, row.values))}", fix)
            has_complained = True
            continue
        if column not in used:
            used.add(column)
            tally.columns_used[str(column)] += 1
            tally.columns_not_used.update(str(name) for name in row.values if name not in (column, "id"))
        text = _text(row, column, problems)
        if text is None:
            continue
        if problems.has_bad_bytes and MARK in text:
            tally.dropped[NOT_UTF8_ROW] += 1
            continue
        clean = cleaned(text)
        tally.characters_extracted += len(text)
        tally.cleaned.update(clean.removed)
        tally.undecoded += clean.undecoded
        look.saw(clean.text, is_row=True)
        identity = row.values.get("id")
        document = tally.accept(f"{label}#{row.number}" if identity in (None, "") else str(identity), clean.text)
        if document:
            yield document


def text_column(values: dict[str, Any]) -> Any:
    """The column that holds the text of a row, or None."""
    names = {str(name).strip().lower(): name for name in values}
    # in a file of labelled examples `document` is a name, and training on names would look like success
    known = [names[name] for name in TEXT_COLUMNS if name in names and not (name == "document" and "question" in names)]
    # an empty `text` beside a filled `content` is not the text
    return next((name for name in known if values[name] not in (None, "")), known[0] if known else None)


def _text(row: TableRow, column: Any, problems: ProblemList) -> str | None:
    text = row.values[column]
    if text is None or isinstance(text, str):
        if len(text or "") <= LONGEST_DOCUMENT:
            return text or ""
        what = f"{row.place}: a document of {len(text):,} characters, and the longest that is read has "
        problems.add(f"{what}{LONGEST_DOCUMENT:,}", fix=SPLIT)
        return None
    what = f"{row.place}: {column!r} is a {type(text).__name__}, not text"
    problems.add(what, text, "write one string per row, or null to leave the row out")
    return None
