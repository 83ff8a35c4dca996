"""Every toy architecture through every script, a process for each core, and the table of it in docs/models.md.

    python -m tests.programs.write_support_matrix [NAME ...]     # with names: those rows, printed and not written

Ends with 1 when a cell is wrong, or fails after the first script.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace

from tests import toy_architectures
from tests.support import ROOT, temporary_directory
from tests.support_matrix import COLUMNS, LATER, WRONG, Cell, row

PAGE, BEGIN, END = ROOT / "docs/models.md", "<!-- support matrix: make models-test -->", "<!-- end -->"
Rows = Mapping[str, Mapping[str, Cell]]


def measured(name: str) -> tuple[str, dict[str, Cell]]:
    """The row of one architecture; data are prepared once in each process."""
    warnings.simplefilter("ignore")
    base = toy_architectures.build(name, temporary_directory() / name)
    cells = row(base, data=_DATA)
    return name, {at: replace(cell, reason=cell.reason.replace(str(base), name)) for at, cell in cells.items()}


def table(rows: Rows) -> str:
    """The rows as Markdown, and why what is refused is."""
    lines = [f"| architecture | class | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    reasons: dict[str, list[str]] = {}
    for name, cells in sorted(rows.items()):
        kind = toy_architectures.SPECS[name][1]
        lines.append(f"| {name} | {kind} | {' | '.join(str(cells[column]) for column in COLUMNS)} |")
        for reason in {cell.reason for cell in cells.values() if cell.reason}:
            reasons.setdefault(" ".join(reason.split()), []).append(name)
    notes = [f"* {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def bad(rows: Rows) -> list[str]:
    """The cells that are neither right nor refused at once, as sentences."""
    return [
        f"{name}, {column}: {cell} {cell.reason}"
        for name, cells in rows.items()
        for column, cell in cells.items()
        if cell.verdict in (WRONG, LATER)
    ]


def main(names: list[str]) -> int:
    """Measure, print, write."""
    rows: dict[str, dict[str, Cell]] = {}
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for name, cells in pool.imap_unordered(measured, names or toy_architectures.SPECS):
            rows[name] = cells
            print(f"{name:<16} {' | '.join(str(cells[column]) for column in COLUMNS)}", flush=True)
    if not names:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")
    problems = bad(rows)
    print("\n".join(problems) or f"{len(rows)} architectures: every cell works, or is refused by the first script")
    return 1 if problems else 0


_DATA = temporary_directory()

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
