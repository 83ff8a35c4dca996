"""A text of OpenDocument (.odt, LibreOffice Writer) as a person reads it: its elements renamed to those of a page."""

from __future__ import annotations

import posixpath
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from utils.data.extraction.archives import open_archive, parse_xml
from utils.data.extraction.extracted import HIDDEN, Extracted, NoTextError, visible_characters
from utils.data.extraction.pages.formulas import formula_text, local_name
from utils.data.extraction.pages.html_text import page_text

Element = Any
COMMENTS, DELETED = "comments", "text that tracked changes delete"
_LEFT_OUT = {
    "tracked-changes": DELETED,
    "annotation": COMMENTS,
    "hidden-text": HIDDEN,
    "hidden-paragraph": HIDDEN,
    # what a picture is called, and the parts of a form
    "title": HIDDEN,
    "desc": HIDDEN,
}
_NAMES = {
    "text": "div",
    "p": "p",
    "list": "ul",
    "list-item": "li",
    "list-header": "li",
    "table": "table",
    "table-header-rows": "thead",
    "table-row": "tr",
    "table-cell": "td",
    "covered-table-cell": "td",
    "line-break": "br",
    "section": "div",
    "text-box": "div",
}
_MOST_BLANKS = 100


def extract_odt(path: Path) -> Extracted:
    """The text of an .odt with its changes accepted. Raises NoTextError if it is damaged, encrypted or without text."""
    with open_archive(path) as archive:
        names = set(archive.namelist())
        if "content.xml" not in names:
            raise NoTextError("it is no OpenDocument file: it has no content.xml")
        manifest = archive.read("META-INF/manifest.xml") if "META-INF/manifest.xml" in names else b""
        if b"encryption-data" in manifest:
            raise NoTextError("the document is encrypted", fix="save it without a password")
        root = parse_xml(archive.read("content.xml"))
        drawn = sum(not _written_formula(archive, names, e) for e in root.iter() if local_name(e) == "object")
    body = next((e for e in root.iter() if local_name(e) == "body"), None)
    if body is None:
        raise NoTextError("the document has no text")
    removed: Counter[str] = Counter()
    hidden = {_attribute(e.getparent(), "name") for e in root.iter() if _attribute(e, "display") == "none"}
    for element in list(body.iter()):
        reason = _LEFT_OUT.get(local_name(element))
        if not reason and _attribute(element, "style-name") in hidden:
            reason = HIDDEN
        if reason and element.getparent() is not None:
            removed[reason] += visible_characters("".join(element.itertext()))
            _take_out(element)
    for note in [e for e in body.iter() if local_name(e) == "note"]:
        note_text = " ".join(" ".join(part.itertext()) for part in note if local_name(part) == "note-body")
        for part in list(note):
            note.remove(part)
        note.text = f" ({' '.join(note_text.split())})"
    for element in list(body.iter()):
        _rename(element)
    body.tag = "body"
    page = page_text(body, None)
    if not page.documents[0][1].strip():
        raise NoTextError("the document has no text")
    removed = +(removed + page.removed)
    notes = [f"{drawn} charts and embedded files were left out"] if drawn else []
    visible = page.visible + removed.total()
    return Extracted.whole(page.documents[0][1], visible=visible, removed=removed, notes=notes)


def _written_formula(archive: zipfile.ZipFile, names: set[str], element: Element) -> bool:
    """Whether an embedded object is a formula: it is then the element's text."""
    name = posixpath.normpath(_attribute(element, "href")) + "/content.xml"
    root = parse_xml(archive.read(name)) if name in names else None
    formula = next((e for e in root.iter() if local_name(e) == "math"), None) if root is not None else None
    if formula is not None:
        element.text = formula_text(formula)
    return formula is not None


def _rename(element: Element) -> None:
    name = local_name(element)
    if name == "s":  # a run of blanks, which XML would make one
        count = _attribute(element, "c")
        element.text = " " * min(int(count) if count.isdigit() else 1, _MOST_BLANKS)
    elif name == "tab":
        element.text = "\t"
    if name == "h":
        level = _attribute(element, "outline-level")
        element.tag = f"h{min(int(level), 6) if level.isdigit() and int(level) else 1}"
    else:
        element.tag = _NAMES.get(name, "span")
    element.attrib.clear()


def _attribute(element: Element, name: str) -> str:
    """The value of an attribute, whatever namespace it is in; "" without one."""
    return next((value for key, value in element.attrib.items() if key.rpartition("}")[2] == name), "")


def _take_out(element: Element) -> None:
    """Remove an element and keep what stands behind it."""
    parent, before = element.getparent(), element.getprevious()
    if before is not None:
        before.tail = (before.tail or "") + (element.tail or "")
    else:
        parent.text = (parent.text or "") + (element.tail or "")
    parent.remove(element)
