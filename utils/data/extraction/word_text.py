"""A Word file as a person reads it with its changes accepted: mammoth makes HTML of it, `html_text` makes text of that.

mammoth reads paragraphs, lists, tables, notes, links and symbols. What it leaves out is first put into a form that it
reads: fields, content in tags, moved text, text boxes (each once), formulas; hidden text is taken out. Whatever is in
the file's text and not in the result is counted.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from utils.data.extraction import word_numbering
from utils.data.extraction.archives import open_archive, parse_xml
from utils.data.extraction.extracted import HIDDEN, RUNNING, Extracted, NoTextError, visible_characters
from utils.data.extraction.pages.formulas import formula_text
from utils.data.extraction.pages.html_text import extract_html, page_text, parse
from utils.data.extraction.text_decoding import decode

Element = Any

DELETED, OVERLOOKED = "text that tracked changes delete", "text in parts of Word files that are not read"
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_MATH = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_CHOICE = "{http://schemas.openxmlformats.org/markup-compatibility/2006}AlternateContent"
_PARTS = ("word/document.xml", "word/footnotes.xml", "word/endnotes.xml")
_STYLES = ("word/styles.xml", "word/numbering.xml")
_LOOKS = tuple(_WORD + name for name in ("latentStyles", "docDefaults", "tblStylePr", "tblPr", "tblBorders", "spacing"))
_KEPT_OF_RUNS = tuple(_WORD + name for name in ("vertAlign", "del", "ins"))
_ASIDE = re.compile(r"word/(header|footer|comments)\d*\.xml")
_ASIDE_NAMES = {"header": RUNNING, "footer": RUNNING, "comments": "comments"}
_REMOVED = tuple(_WORD + name for name in ("del", "moveFrom"))
_UNWRAPPED = ("ins", "moveTo", "fldSimple", "smartTag", "customXml", "dir", "bdo", "hyperlink", "sdtContent", "sdt")
_UNWRAPPED = tuple(_WORD + name for name in _UNWRAPPED)
# what is drawn; its text boxes have been taken out by then
_DRAWN = tuple(_WORD + name for name in ("drawing", "pict", "object"))
_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def extract_docx(path: Path) -> Extracted:
    """The text of a .docx or .docm. Raises NoTextError if the file is damaged, too large or without text."""
    import mammoth

    removed: Counter[str] = Counter()
    with open_archive(path) as archive:
        names = set(archive.namelist())
        main = _main_part(archive, names)
        hidden = _hidden_styles(archive, names)
        changed: dict[str, bytes] = {}
        notes: list[str] = []
        visible = 0
        for name in (main, *_PARTS[1:]):
            if name in names:
                root = parse_xml(archive.read(name))
                if name == main and (chunks := _with_chunks(archive, names, main, root)):
                    notes.append(f"{chunks} embedded documents were left out")
                _normalise(root, hidden, removed)
                visible += sum(visible_characters(t.text or "") for t in root.iter(_WORD + "t"))
                if name == main and _STYLES[1] in names:
                    parsed = [parse_xml(archive.read(part)) if part in names else None for part in _STYLES[::-1]]
                    word_numbering.write_numbers(root, word_numbering.Numbering.of(*parsed), _run)
                changed[name] = _slim(root)
        changed |= {name: _slim(parse_xml(archive.read(name))) for name in _STYLES if name in names}
        for name in names:
            if aside := _ASIDE.fullmatch(name):
                texts = parse_xml(archive.read(name)).iter(_WORD + "t")
                removed[_ASIDE_NAMES[aside[1]]] += sum(visible_characters(t.text or "") for t in texts)
        packed = _repacked(archive, changed)
    markup = mammoth.convert_to_html(packed, convert_image=mammoth.images.img_element(lambda image: {})).value
    if not markup.strip():
        raise NoTextError("the Word file has no text")
    root = parse(f"<html><body>{markup}</body></html>")
    if root is None:
        raise NoTextError("its tables or lists are nested too deeply")
    for link in [a for a in root.iter("a") if (a.text or "") == "↑"]:
        link.text = ""
    visible += word_numbering.take_numbers(root)
    page = page_text(root, None)
    text = page.documents[0][1]
    if not text.strip():
        raise NoTextError("the Word file has no text")
    lost = visible - page.visible
    if lost > 0:
        removed[OVERLOOKED] += lost
    removed = +removed
    return Extracted.whole(text, visible=page.visible + removed.total(), removed=removed, notes=notes)


def _main_part(archive: zipfile.ZipFile, names: set[str]) -> str:
    """The part that holds the document; a few producers call it otherwise."""
    if _PARTS[0] in names or "_rels/.rels" not in names:
        return _PARTS[0]
    for relation in parse_xml(archive.read("_rels/.rels")):
        if (relation.get("Type") or "").endswith("/officeDocument"):
            return (relation.get("Target") or "").lstrip("/")
    return _PARTS[0]


def _hidden_styles(archive: zipfile.ZipFile, names: set[str]) -> set[str]:
    if "word/styles.xml" not in names:
        return set()
    styles = {s.get(_WORD + "styleId"): s for s in parse_xml(archive.read("word/styles.xml")).iter(_WORD + "style")}
    hidden: set[str] = set()
    for name, style in styles.items():
        seen = [style]  # a style is what it is based on, where it says nothing of its own
        while (own := seen[-1].find(f"{_WORD}rPr/{_WORD}vanish")) is None:
            base = seen[-1].find(_WORD + "basedOn")
            above = styles.get(base.get(_WORD + "val")) if base is not None else None
            if above is None or above in seen:
                break
            seen.append(above)
        if _is_on(own):
            hidden.add(name or "")
    return hidden


def _normalise(root: Element, hidden: set[str], removed: Counter[str]) -> None:
    for element in list(root.iter(*_REMOVED)):
        if getattr(element.getparent(), "tag", None) != _WORD + "rPr":  # there it is the paragraph's own mark
            removed[DELETED] += _text_length(element)
            _take_out(element)
    for row in list(root.iter(_WORD + "tr")):
        if row.find(f"{_WORD}trPr/{_WORD}del") is not None:
            removed[DELETED] += _text_length(row)
            _take_out(row)
    for run in list(root.iter(_WORD + "r")):
        if _is_hidden(run, hidden):
            removed[HIDDEN] += _text_length(run)
            _take_out(run)
    _field_codes(root)
    while root.find(f".//{_WORD}txbxContent") is not None:  # text boxes may hold text boxes
        _text_boxes(root)
    for drawn in list(root.iter(*_DRAWN)):
        _take_out(drawn)
    for ruby in list(root.iter(_WORD + "ruby")):
        base, reading = (list(ruby.iterfind(f"{_WORD}{part}/{_WORD}r")) for part in ("rubyBase", "rt"))
        _replace(ruby.getparent(), [*base, _run("("), *reading, _run(")")])
    for formula in list(root.iter(_MATH + "oMath")):
        _replace(formula, [_run(formula_text(formula))])
    for element in list(root.iter(*_UNWRAPPED, _MATH + "oMathPara")):
        _replace(element, [child for child in element if not str(child.tag).endswith("Pr")])


def _field_codes(root: Element) -> None:
    """Takes out what stands in the code of a field: the result of an inner field there is no text of the page."""
    is_code: list[bool] = []
    for child in [child for run in root.iter(_WORD + "r") for child in run]:
        if child.tag == _WORD + "fldChar":
            kind = child.get(_WORD + "fldCharType")
            if kind == "begin":
                is_code.append(True)
            elif is_code and kind == "separate":
                is_code[-1] = False
            elif is_code:
                is_code.pop()
        elif child.tag == _WORD + "t" and any(is_code):
            _take_out(child)


def _with_chunks(archive: zipfile.ZipFile, names: set[str], main: str, root: Element) -> int:
    """Puts the texts of embedded pages where they stand; returns how many parts of other formats are left out."""
    left_out = 0
    folder, _, file = main.rpartition("/")
    relations = f"{folder}/_rels/{file}.rels"
    targets = (
        {r.get("Id"): r.get("Target") or "" for r in parse_xml(archive.read(relations))} if relations in names else {}
    )
    for chunk in list(root.iter(_WORD + "altChunk")):
        target = targets.get(chunk.get(_RELATION), "")
        name = target.lstrip("/") if target.startswith("/") else f"{folder}/{target}"
        if name in names and name.lower().endswith((".htm", ".html", ".xhtml", ".txt")):
            markup, _ = decode(archive.read(name), markup=True)
            text = markup if name.lower().endswith(".txt") else extract_html(markup).documents[0][1]
            _replace(chunk, [_paragraph(line) for line in text.split("\n") if line.strip()])
        else:
            left_out += 1
    return left_out


def _paragraph(text: str) -> Element:
    from lxml import etree

    paragraph = etree.Element(_WORD + "p")
    paragraph.append(_run(text))
    return paragraph


def _is_hidden(run: Element, hidden: set[str]) -> bool:
    """By the run's own word, else by its style, else by its paragraph's."""
    if (own := run.find(f"{_WORD}rPr/{_WORD}vanish")) is not None:
        return _is_on(own)
    style = run.find(f"{_WORD}rPr/{_WORD}rStyle")
    if style is None:
        paragraph = next(run.iterancestors(_WORD + "p"), None)
        style = paragraph.find(f"{_WORD}pPr/{_WORD}pStyle") if paragraph is not None else None
    return style is not None and style.get(_WORD + "val") in hidden


def _text_boxes(root: Element) -> None:
    """The paragraphs of a text box, behind the paragraph that it is anchored in; of two alternatives the first."""
    for alternative in list(root.iter(_CHOICE)):
        boxes = [list(branch.iter(_WORD + "txbxContent")) for branch in alternative]
        with_text = [group for group in boxes if group]
        if with_text:
            for branch in list(alternative):
                if (
                    list(branch.iter(_WORD + "txbxContent")) is not with_text[0]
                    and with_text[0][0] not in branch.iter()
                ):
                    alternative.remove(branch)
    for box in list(root.iter(_WORD + "txbxContent")):
        if any(parent.tag == _WORD + "txbxContent" for parent in box.iterancestors()):
            continue
        paragraph = next((p for p in box.iterancestors() if p.tag == _WORD + "p"), None)
        if paragraph is None:
            _replace(box, list(box))
            continue
        place, at = paragraph.getparent(), paragraph.getparent().index(paragraph)
        for number, child in enumerate(list(box), 1):
            place.insert(at + number, child)
        _take_out(box)


def _run(text: str) -> Element:
    from lxml import etree

    run = etree.Element(_WORD + "r")
    content = etree.SubElement(run, _WORD + "t")
    content.text = text
    content.set("{http://www.w3.org/XML/1998/namespace}space", "preserve")
    return run


def _replace(element: Element, children: list[Element]) -> None:
    parent = element.getparent()
    if parent is not None:
        at = parent.index(element)
        parent[at : at + 1] = children


def _take_out(element: Element) -> None:
    if element.getparent() is not None:
        element.getparent().remove(element)


def _text_length(element: Element) -> int:
    return sum(visible_characters(t.text or "") for t in element.iter(_WORD + "t", _WORD + "delText"))


def _is_on(element: Element | None) -> bool:
    return element is not None and element.get(_WORD + "val") not in ("0", "false", "off")


def _slim(root: Element) -> bytes:
    """The part without what only changes how text looks: reading that is most of mammoth's time."""
    from lxml import etree

    for element in list(root.iter(*_LOOKS)):
        _take_out(element)
    for properties in root.iter(_WORD + "rPr"):
        for child in [child for child in properties if child.tag not in _KEPT_OF_RUNS]:
            properties.remove(child)
    return etree.tostring(root, xml_declaration=True, encoding="UTF-8", standalone=True)


def _repacked(archive: zipfile.ZipFile, changed: dict[str, bytes]) -> io.BytesIO:
    """The archive with the changed parts alone, and how they belong together."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as copy:
        for name in archive.namelist():
            if name in changed or name.endswith(".rels") or name == "[Content_Types].xml":
                copy.writestr(name, changed[name] if name in changed else archive.read(name))
    packed.seek(0)
    return packed
