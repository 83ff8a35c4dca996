"""Writes text block by block: paragraphs, lines, indented items, code as it is, rows of cells."""

from __future__ import annotations

import re

_BLANKS = re.compile(r"[ \t\n\r\f\v]+")
_DEEPEST_INDENT = 20
INDENT = "    "
CELL = " | "


class TextBlocks:
    """The text so far. White space between words is one blank, and line ends are what the calls say."""

    def __init__(self) -> None:
        self._out: list[str] = []
        # of the current line, and of how many line ends must stand before it
        self._line: list[str] = []
        self._breaks = 0
        self._prefix = ""
        self._indents: list[bool] = []
        self._code: list[str] | None = None
        # for each open table its rows, and for each open cell what surrounds it
        self._rows: list[list[str]] = []
        self._cells: list[list[str]] = []
        self._outside: list[tuple[list[str], list[str], int, str, list[bool], bool]] = []

    @property
    def in_cell(self) -> bool:
        """Whether a cell of a table is being written."""
        return bool(self._outside)

    def text(self) -> str:
        """All of it."""
        self._end_line()
        return "".join(self._out).strip("\n")

    def inline(self, text: str) -> None:
        """Words of the current line; in code, characters as they are."""
        if self._code is not None:
            self._code.append(text)
            return
        text = _BLANKS.sub(" ", text)
        if not self._line or self._line[-1].endswith((" ", "\n")):
            text = text.lstrip(" ")
        if text:
            self._line.append(text)

    def line(self) -> None:
        """What follows begins on a new line."""
        if self._code is None:
            self._end_line()
            self._breaks = max(self._breaks, 1)

    def paragraph(self) -> None:
        """What follows begins behind a blank line."""
        if self._code is None:
            self._end_line()
            self._breaks = 2

    def line_break(self) -> None:
        """A line end inside a paragraph."""
        if self._code is not None:
            self._code.append("\n")
        elif self._line:
            self._end_line()
            self._breaks = max(self._breaks, 1)

    def prefix(self, mark: str) -> None:
        """The next line begins with this mark."""
        if self._code is None:
            self._prefix += mark

    def indent(self, is_deeper: bool) -> None:
        """The following lines stand four blanks further to the right, or as they are, until `dedent`."""
        self._indents.append(is_deeper)

    def dedent(self) -> None:
        """Undo the last `indent`."""
        if self._code is None:
            self._end_line()
        # an item without words leaves no mark behind
        self._prefix = ""
        if self._indents:
            self._indents.pop()

    def begin_code(self, language: str) -> None:
        """What follows is kept character by character, between fences, until `end_code`."""
        if self._code is None:
            self.paragraph()
            self._code = [language]

    def end_code(self) -> None:
        """The end of code; code without a character leaves no fences."""
        if self._code is None:
            return
        language, *parts = self._code
        self._code = None
        text = "".join(parts).strip("\n")
        if not text.strip():
            return
        if self.in_cell:
            self.inline(text)
            return
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
        self._write(f"{fence}{language}\n{text}\n{fence}")
        self._breaks = 2

    def begin_table(self, *, nested: bool) -> None:
        """Rows follow; a table inside a cell becomes part of the cell."""
        if not nested:
            self.paragraph()
        self._rows.append([])

    def begin_row(self) -> None:
        """Cells follow."""
        self._cells.append([])

    def begin_cell(self) -> None:
        """What is written until `end_cell` is one cell, in one line."""
        if not self._cells:
            self._cells.append([])
        self._outside.append((self._out, self._line, self._breaks, self._prefix, self._indents, self._code is not None))
        self._out, self._line, self._breaks, self._prefix, self._indents = [], [], 0, "", []

    def end_cell(self) -> None:
        """The cell is done."""
        if not self._outside:
            return
        self.end_code()
        cell = " ".join(self.text().split())
        self._out, self._line, self._breaks, self._prefix, self._indents, _ = self._outside.pop()
        self._cells[-1].append(cell)

    def end_row(self) -> None:
        """The row is one line, its cells joined; a row without a word leaves none."""
        cells = self._cells.pop() if self._cells else []
        if any(cells):
            row = CELL.join(cells)
            (self._rows[-1] if self._rows else self._out).append(row)

    def end_table(self) -> None:
        """The rows, a line each; inside a cell one after the other."""
        rows = self._rows.pop() if self._rows else []
        if self.in_cell:
            self.inline(" " + "; ".join(rows) + " ")
        elif rows:
            self._end_line()
            self._write("\n".join(rows))
            self._breaks = 2

    def _end_line(self) -> None:
        line = "".join(self._line).rstrip(" ")
        self._line = []
        if line:
            self._write(line)
            self._breaks = 1

    def _write(self, text: str) -> None:
        # the first line of an item stands at its mark, the others of it below its text
        deep = min(sum(self._indents), _DEEPEST_INDENT)
        lead = INDENT * deep
        if self._out:
            self._out.append("\n" * max(1, self._breaks))
        self._out.append(lead + self._prefix + text.replace("\n", "\n" + lead) if lead else self._prefix + text)
        self._prefix = ""
        self._breaks = 0
