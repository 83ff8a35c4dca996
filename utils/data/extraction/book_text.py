"""Books and notebooks, by the standard library: a ZIP of pages, JSON of cells."""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from utils.data.extraction.archives import open_archive, parse_xml
from utils.data.extraction.extracted import Extracted, NoTextError
from utils.data.extraction.pages.formulas import local_name
from utils.data.extraction.pages.html_text import extract_html, page_text, parse
from utils.data.extraction.text_decoding import decode

OUTPUTS = "output of notebooks that is no text"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def extract_epub(path: Path) -> Extracted:
    """The chapters of a book in its reading order, its table of contents left out."""
    removed: Counter[str] = Counter()
    chapters, visible = [], 0
    with open_archive(path) as archive:
        names = set(archive.namelist())
        if "META-INF/encryption.xml" in names and "META-INF/rights.xml" in names:
            raise NoTextError("the book is protected against copying")
        for name in _spine(archive, names):
            markup, _ = decode(archive.read(name), markup=True)
            root = parse(markup)
            if root is None:
                raise NoTextError(f"{name} in it is nested too deeply")
            chapter = page_text(root, None)
            visible += chapter.visible
            removed.update(chapter.removed)
            chapters.append(chapter.documents[0][1])
    text = "\n\n".join(filter(None, chapters))
    if not text.strip():
        raise NoTextError("the book has no text")
    return Extracted.whole(text, visible=visible, removed=removed)


def extract_notebook(path: Path) -> Extracted:
    """The cells of a Jupyter notebook: prose as it is, code between fences, and what the code printed."""
    text, _ = decode(path.read_bytes())
    notebook = json.loads(text)
    cells = notebook.get("cells") or [cell for sheet in notebook.get("worksheets", []) for cell in sheet["cells"]]
    language = (notebook.get("metadata") or {}).get("kernelspec", {}).get("language", "")
    parts, dropped = [], 0
    for cell in cells:
        source = _joined(cell.get("source") or cell.get("input"))
        if cell.get("cell_type") == "heading" and source:  # of notebooks before format 4
            source = f"{'#' * _level(cell)} {source}"
        is_code = cell.get("cell_type") == "code"
        parts.append(f"```{language}\n{source}\n```" if is_code and source.strip() else source)
        for output in cell.get("outputs", []):
            printed = _printed(output)
            dropped += not printed
            parts.append(f"```\n{_ESCAPES.sub('', printed).rstrip()}\n```" if printed.strip() else "")
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise NoTextError("the notebook has no text")
    notes = [f"{dropped} outputs that are no text were left out"] if dropped else []
    return Extracted.whole(text, notes=notes)


def _level(cell: dict[str, Any]) -> int:
    level = cell.get("level")
    return min(max(level, 1), 6) if isinstance(level, int) else 1


def _printed(output: dict[str, Any]) -> str:
    """What an output shows as text: what was printed, a value, an error; "" for a picture."""
    data = output.get("data") or {}
    if output.get("output_type") in ("error", "pyerr"):
        return "\n".join(output.get("traceback") or []) or f"{output.get('ename')}: {output.get('evalue')}"
    for kind in ("text/plain", "text/markdown", "text/latex"):
        if text := _joined(output.get("text") or data.get(kind)):
            # a picture's `<Figure size 640x480>` is not seen
            is_name = kind == "text/plain" and text.startswith("<") and any(one.startswith("image/") for one in data)
            return "" if is_name else text
    page = _joined(data.get("text/html"))
    return extract_html(page).documents[0][1] if page.strip() else ""


def _spine(archive: object, names: set[str]) -> list[str]:
    container = parse_xml(archive.read("META-INF/container.xml"))
    package = next((e.get("full-path") for e in container.iter() if local_name(e) == "rootfile"), None)
    if package not in names:
        raise NoTextError("the book has no list of its parts")
    root = parse_xml(archive.read(package))
    items = {e.get("id"): e for e in root.iter() if local_name(e) == "item"}
    chosen = []
    for reference in (e for e in root.iter() if local_name(e) == "itemref"):
        item = items.get(reference.get("idref"))
        if item is None or "nav" in (item.get("properties") or "").split():
            continue
        name = posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(item.get("href") or "")))
        if name in names and "html" in (item.get("media-type") or name):
            chosen.append(name)
    return chosen


def _joined(lines: object) -> str:
    if isinstance(lines, list):
        return "".join(line for line in lines if isinstance(line, str))
    return lines if isinstance(lines, str) else ""
