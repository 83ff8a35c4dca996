"""What became of a file of labelled pairs: columns, rows, turns; the same for the manifest and the screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 12


@dataclass(frozen=True)
class TaskReport:
    """What was read: rows seen, examples kept, reason -> number dropped, and the shape or shapes found."""

    rows: int
    examples: int
    dropped: dict[str, int]
    shape: str
    rows_without_document: int
    """Examples that stand for a document of their own, because no column says what they were written from."""
    columns: dict[str, dict[str, int]] = field(default_factory=dict)
    """Role -> column -> in how many rows it was read as that."""
    columns_not_used: dict[str, int] = field(default_factory=dict)
    """Column -> in how many rows it is filled and was not read."""
    notes: dict[str, int] = field(default_factory=dict)
    """What else was left out or changed, and how often."""
    documents: dict[str, Any] = field(default_factory=dict)
    """Which columns name the document of a pair, which do not, and why."""
    earlier_turns: dict[str, int] = field(default_factory=dict)
    """Assistant turns before the last one: `trained`, and `context` that is only read."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain values for a manifest."""
        return asdict(self)


def lines(name: str, report: Mapping[str, Any]) -> Iterator[str]:
    """A report for a terminal."""
    yield f"{name}: {report['rows']:,} rows, {report['examples']:,} used, as {report['shape'] or 'nothing'}"
    for role, columns in report.get("columns", {}).items():
        yield f"  {role:<10} <- {_counted(columns, report['rows'])}"
    documents = report.get("documents", {})
    for column, why in documents.get("document", {}).items():
        yield f"  document   <- {column} ({why})"
    for column, why in documents.get("not_document", {}).items():
        yield f"  no document: {column}: {why}; if they are documents: --data.columns document={column}"
    if documents.get("source"):
        yield f"  source     <- {documents['source']} ({documents['why_source']})"
    if missing := report.get("rows_without_document"):
        yield f"  {missing:,} pairs name no document: they are split one by one, those with the same context together"
    if unused := report.get("columns_not_used"):
        yield f"  columns not used: {_counted(unused, report['rows'])}"
    if missing and unused:
        column = max(unused, key=lambda name: unused[name])
        yield f"  if one of them says what pairs are about, keep those together: --data.columns document={column}"
    if any((turns := report.get("earlier_turns", {})).values()):
        yield f"  earlier assistant turns: {turns['trained']:,} trained, {turns['context']:,} context only"
    for reason, number in report.get("dropped", {}).items():
        if number:
            yield f"  left out {number:,}: {reason}"
    for note, number in report.get("notes", {}).items():
        yield f"  {number:,} times: {note}"


def _counted(columns: Mapping[str, int], rows: int) -> str:
    listed = [column if number == rows else f"{column} ({number:,} rows)" for column, number in columns.items()]
    return ", ".join([*listed[:SHOWN], *([f"and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else [])])
