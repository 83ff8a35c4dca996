"""Pieces of a page in the order in which they are read: columns one after the other, rows of tables cell by cell.

Where several rows in a row leave the same gap, it is a gutter. What stands on its sides is two columns of prose when
lines on both sides are long, and a table when they are not. What crosses the gutter ends it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from utils.data.extraction.pdf.pdf_pieces import SAME_ROW, TextPiece

CELL = " | "
# a side of a gutter with fewer characters a line is a column of a table
PROSE_CHARACTERS = 20
# browsers leave 1 em between columns, LaTeX 10 points, where a line is 1.2 em high
NARROWEST_GUTTER, FEWEST_ROWS = 0.7, 2
_LIST_MARK = re.compile(r"[^\w\s]|\(?\w{1,3}[.):]|\d+")
# of a row's usual distance: from here on it begins a paragraph
PARAGRAPH = 1.35
# in heights of a row: how far apart two rows of a column stand that has no neighbour there any more
COLUMN_GAP, LAST_COLUMN_GAP = 1.8, 3.0
_DEEPEST = 6


@dataclass
class PageRow:
    """Pieces side by side, from left to right."""

    pieces: list[TextPiece]

    @property
    def y0(self) -> float:
        return min(p.y0 for p in self.pieces)

    @property
    def y1(self) -> float:
        return max(p.y1 for p in self.pieces)

    @property
    def middle(self) -> float:
        """Of the tallest piece: notes raised above a line do not move it."""
        tallest = max(self.pieces, key=lambda p: p.height)
        return (tallest.y0 + tallest.y1) / 2

    @property
    def height(self) -> float:
        return max(p.height for p in self.pieces)

    @property
    def text(self) -> str:
        return " ".join(p.text for p in self.pieces)


def rows_of(pieces: Sequence[TextPiece]) -> list[PageRow]:
    """The pieces as rows, from the top of the page to its bottom."""
    rows: list[PageRow] = []
    for piece in sorted(pieces, key=lambda p: -(p.y0 + p.y1)):
        for row in rows[-3:]:
            overlap = min(row.y1, piece.y1) - max(row.y0, piece.y0)
            if overlap >= SAME_ROW * max(min(row.height, piece.height), 0.1):
                row.pieces.append(piece)
                break
        else:
            rows.append(PageRow([piece]))
    for row in rows:
        row.pieces.sort(key=lambda p: p.x0)
    return sorted(rows, key=lambda row: -row.middle)


def lines_of(rows: Sequence[PageRow], depth: int = 0) -> list[str]:
    """The rows as lines in reading order; an empty line begins a paragraph, a column or a table."""
    gutter = _gutter(rows) if depth < _DEEPEST else None
    if gutter is None:
        return _paragraphs(rows)
    lines: list[str] = []
    plain: list[PageRow] = []
    for is_region, region in _regions(rows, gutter):
        if not is_region:
            plain += region
            continue
        if plain:
            lines += [*lines_of(plain, depth + 1), ""]
            plain = []
        lines += [*_region_lines(region, gutter, depth), ""]
    if plain:
        lines += lines_of(plain, depth + 1)
    return lines


def _gutter(rows: Sequence[PageRow]) -> float | None:
    """The x at which the most rows have a gap with text on both sides; None where fewer than two have one."""
    edges: list[tuple[float, int]] = []
    for row in rows:
        for left, right in zip(row.pieces, row.pieces[1:], strict=False):
            if right.x0 - left.x1 >= NARROWEST_GUTTER * min(left.height, right.height):
                edges += [(left.x1, 1), (right.x0, -1)]
    best, count, at = 0, 0, None
    edges.sort()
    for number, (x, step) in enumerate(edges):
        count += step
        if count > best and number + 1 < len(edges):
            best, at = count, (x + edges[number + 1][0]) / 2
    return at if best >= FEWEST_ROWS else None


def _sides(row: PageRow, gutter: float) -> tuple[list[TextPiece], list[TextPiece]] | None:
    """Pieces on the left and on the right; None if one crosses the gutter."""
    if any(p.x0 < gutter - 1 and p.x1 > gutter + 1 for p in row.pieces):
        return None
    middle = [(p.x0 + p.x1) / 2 < gutter for p in row.pieces]
    left = [p for p, is_left in zip(row.pieces, middle, strict=True) if is_left]
    return left, [p for p, is_left in zip(row.pieces, middle, strict=True) if not is_left]


def _regions(rows: Sequence[PageRow], gutter: float) -> list[tuple[bool, list[PageRow]]]:
    """The rows in runs: those that keep the gutter free, with text on both sides in at least two; and the others."""
    runs: list[tuple[bool, list[PageRow]]] = []
    for row in rows:
        is_free = _sides(row, gutter) is not None
        if not runs or runs[-1][0] != is_free:
            runs.append((is_free, []))
        runs[-1][1].append(row)
    regions: list[tuple[bool, list[PageRow]]] = []
    for is_free, run in runs:
        both = [number for number, row in enumerate(run) if is_free and all(_sides(row, gutter) or ())]
        if len(both) < FEWEST_ROWS:
            regions.append((False, run))
            continue
        first, last = both[0], both[-1] + 1
        # a column may be longer than its neighbour; what stands below it further away is text of the whole page, or,
        # where only such rows follow, the column's next paragraph
        is_last = run is runs[-1][1] and _is_prose(run[first:last], gutter)
        furthest = LAST_COLUMN_GAP if is_last else COLUMN_GAP
        while last < len(run) and run[last - 1].middle - run[last].middle < furthest * run[last].height:
            last += 1
        while first > 0 and run[first - 1].middle - run[first].middle < COLUMN_GAP * run[first].height and not regions:
            first -= 1
        regions += [(False, run[:first]), (True, run[first:last]), (False, run[last:])]
    return [(is_region, run) for is_region, run in regions if run]


def _region_lines(rows: list[PageRow], gutter: float, depth: int) -> list[str]:
    left, right = _columns(rows, gutter)
    if all(_LIST_MARK.fullmatch(" ".join(p.text for p in pieces)) for pieces in left):
        return _paragraphs(rows)
    if _is_prose(rows, gutter):
        return [
            *lines_of([PageRow(pieces) for pieces in left], depth + 1),
            "",
            *lines_of([PageRow(pieces) for pieces in right], depth + 1),
        ]
    return _table(rows)


def _columns(rows: Sequence[PageRow], gutter: float) -> tuple[list[list[TextPiece]], list[list[TextPiece]]]:
    """The rows of text on the left of the gutter, and those on its right."""
    sides = [_sides(row, gutter) or (row.pieces, []) for row in rows]
    return [left for left, _ in sides if left], [right for _, right in sides if right]


def _is_prose(rows: Sequence[PageRow], gutter: float) -> bool:
    return min(map(_characters, _columns(rows, gutter))) >= PROSE_CHARACTERS


def _characters(side: list[list[TextPiece]]) -> float:
    return median(sum(len(p.text) for p in pieces) for pieces in side)


def _table(rows: list[PageRow]) -> list[str]:
    """A line for each row, empty cells kept; columns are where hardly any row has a piece between them."""
    gap = NARROWEST_GUTTER / 2 * median(row.height for row in rows)
    spans = sorted((p.x0, p.x1) for row in rows for p in row.pieces)
    widths = sorted(x1 - x0 for x0, x1 in spans)
    # headings over several columns would close the gaps between them
    usual = 3 * widths[len(widths) // 2] + gap
    borders: list[float] = []
    reach = spans[0][1]
    for x0, x1 in spans:
        if x1 - x0 > usual:
            continue
        if x0 - reach >= gap:
            borders.append((reach + x0) / 2)
        reach = max(reach, x1)
    lines = []
    for row in rows:
        cells = [""] * (len(borders) + 1)
        for piece in row.pieces:
            column = sum(piece.x0 >= border for border in borders)
            cells[column] = f"{cells[column]} {piece.text}".strip()
        lines.append(CELL.join(cells))
    return lines


def _paragraphs(rows: Sequence[PageRow]) -> list[str]:
    lines: list[str] = []
    steps = [above.middle - below.middle for above, below in itertools.pairwise(rows)]
    usual = median([step for step in steps if step > 0] or [0])
    for number, row in enumerate(rows):
        if number and steps[number - 1] > max(PARAGRAPH * usual, 1.1 * row.height):
            lines.append("")
        lines.append(row.text)
    return lines
