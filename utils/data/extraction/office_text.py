"""Workbooks and presentations: sheets as rows of cells, slides as what stands on them from top to bottom."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.data.extraction.archives import open_archive, parse_xml
from utils.data.extraction.extracted import HIDDEN, Extracted, NoTextError, visible_characters
from utils.data.extraction.pages.formulas import local_name

CELL = " | "
BESIDE_CELLS = "comments and text boxes of workbooks"
_BESIDE_CELLS = re.compile(r"xl/(?:comments/?[^/]*|drawings/drawing[^/]*)\.xml")


# a formula that the program which wrote the file did not compute
_SHEET = re.compile(r"xl/worksheets/[^/]*\.xml")
_WITHOUT_VALUE = re.compile(rb"(?:</f>|<f [^<>]*/>)(?:<v ?/>|<v></v>)?</c>")


def extract_workbook(path: Path) -> Extracted:
    """The visible sheets of an Excel or OpenDocument workbook, a line for each row that has a cell with a value."""
    from python_calamine import CalamineError, CalamineWorkbook, SheetTypeEnum, SheetVisibleEnum

    removed: Counter[str] = Counter()
    valueless = 0
    if path.suffix.lower() != ".xls":
        with open_archive(path) as archive:
            for name in filter(_BESIDE_CELLS.fullmatch, archive.namelist()):
                texts = (e.text or "" for e in parse_xml(archive.read(name)).iter() if local_name(e) == "t")
                removed[BESIDE_CELLS] += sum(map(visible_characters, texts))
            for name in filter(_SHEET.fullmatch, archive.namelist()):
                valueless += len(_WITHOUT_VALUE.findall(archive.read(name)))
    try:
        workbook = CalamineWorkbook.from_path(str(path))
    except CalamineError as error:
        raise NoTextError(f"the workbook cannot be read ({error})") from error
    sheets, visible = [], removed.total()
    for sheet in workbook.sheets_metadata:
        if sheet.typ != SheetTypeEnum.WorkSheet:
            continue
        lines = list(_rows(workbook.get_sheet_by_name(sheet.name).to_python(skip_empty_area=True)))
        characters = sum(visible_characters(line.replace(CELL, " ")) for line in lines)
        visible += characters
        if sheet.visible != SheetVisibleEnum.Visible:
            removed[HIDDEN] += characters
        elif lines:
            sheets.append("\n".join([f"# {sheet.name}", "", *lines]))
    what = f"{valueless:,} formulas have no value in the file: open it in Excel or LibreOffice, and save it"
    notes = [what] if valueless else []
    if not sheets:
        raise NoTextError("; ".join(["the workbook has no text", *notes]))
    return Extracted.whole("\n\n".join(sheets), visible=visible, removed=+removed, notes=notes)


def extract_pptx(path: Path) -> Extracted:
    """Slides of a PowerPoint file in their order, each with its notes."""
    from pptx import Presentation

    open_archive(path).close()
    slides, removed, drawn = [], Counter[str](), 0
    for slide in Presentation(str(path)).slides:
        blocks = list(_shapes(slide.shapes))
        drawn += sum(_is_drawn(shape) and not _drawn_text(shape) for shape in slide.shapes)
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            blocks.append(slide.notes_slide.notes_text_frame.text)
        text = "\n\n".join(block.strip() for block in blocks if block.strip())
        if slide._element.get("show") == "0":
            removed[HIDDEN] += visible_characters(text)
        elif text:
            slides.append(text)
    if not slides:
        raise NoTextError("the presentation has no text")
    text = "\n\n".join(slides)
    visible = visible_characters(text) + removed.total() if removed else 0
    notes = [f"{drawn} embedded objects were left out"] if drawn else []
    return Extracted.whole(text, visible=visible, removed=removed, notes=notes)


def _is_drawn(shape: Any) -> bool:
    """Whether a shape is a chart, a diagram or an embedded file, whose words are in another part."""
    return shape._element.tag.endswith("}graphicFrame") and not getattr(shape, "has_table", False)


def _drawn_text(shape: Any) -> str:
    """The words of a diagram (SmartArt), a line for each of its boxes; of a chart title and numbers, as a table.

    Empty where there are none, or for a kind of chart that python-pptx does not know.
    """
    try:
        return _chart_text(shape.chart) if getattr(shape, "has_chart", False) else _diagram_text(shape)
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError, NoTextError):  # its part is damaged
        return ""


def _diagram_text(shape: Any) -> str:
    lines = []
    for ids in (e for e in shape._element.iter() if local_name(e) == "relIds"):
        name = next((value for key, value in ids.attrib.items() if key.endswith("}dm")), "")
        if name in shape.part.rels and not shape.part.rels[name].is_external:
            data = parse_xml(shape.part.related_part(name).blob)
            for box in (e for e in data.iter() if local_name(e) == "t" and len(e)):
                words = (e.text or "" for e in box.iter() if local_name(e) == "t" and not len(e))
                lines.append(" ".join("".join(words).split()))
    return "\n".join(filter(None, lines))


def _chart_text(chart: Any) -> str:
    title = chart.chart_title.text_frame.text if chart.has_title and chart.chart_title.has_text_frame else ""
    lines = [" ".join(title.split())]
    for plot in chart.plots:
        lines.append(CELL.join(["", *(" ".join(str(label).split()) for label in plot.categories)]).rstrip())
        for series in plot.series:
            values = ("" if value is None else _cell(value) for value in series.values)
            lines.append(CELL.join([" ".join((series.name or "").split()), *values]))
    return "\n".join(filter(None, lines))


def _rows(rows: list[list[Any]]) -> Iterator[str]:
    for row in rows:
        cells = [_cell(value) for value in row]
        if any(cells):
            yield CELL.join(cells).rstrip()


def _cell(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.15g}"  # as Excel shows it: 3.3, not 3.3000000000000003
    return " ".join(str(value).split())


def _shapes(shapes: Any) -> Iterator[str]:
    """Texts of shapes as they are read: from top to bottom, then from left to right; groups one after the other."""
    placed = [s for s in shapes if s.has_text_frame or s.shape_type == 6 or s._element.tag.endswith("}graphicFrame")]
    titles = [s for s in placed if s.is_placeholder and s.placeholder_format.type in (1, 3)]
    others = sorted((s for s in placed if s not in titles), key=lambda s: (s.top or 0, s.left or 0))
    for shape in (*titles, *others):
        if shape.shape_type == 6:
            yield from _shapes(shape.shapes)
        elif getattr(shape, "has_table", False):
            yield "\n".join(CELL.join(" ".join(c.text.split()) for c in row.cells) for row in shape.table.rows)
        elif _is_drawn(shape):
            yield _drawn_text(shape)
        else:
            text = shape.text_frame.text.replace("\v", "\n")
            yield f"# {' '.join(text.split())}" if shape in titles and text.strip() else text
