"""A web page as text: its headings, lists, definitions, tables, code and formulas in the order of the page.

`# ` before headings, `- ` or a number before items, four blanks before definitions, ` | ` between cells, fences around
code. Parsed by lxml, walked once without recursion: pages nest as deep as their author likes.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from html import escape
from html.parser import HTMLParser
from typing import Any

from utils.data.extraction.extracted import DRAWN, MENUS, Extracted, NoTextError, visible_characters
from utils.data.extraction.pages.code_views import join_code_lines
from utils.data.extraction.pages.formulas import formula_text
from utils.data.extraction.pages.html_boilerplate import (
    NOT_TEXT,
    PageParts,
    drawn_characters,
    hidden_characters,
    is_not_text,
)
from utils.data.extraction.pages.text_blocks import TextBlocks

Element = Any

# below this share of its visible text a page is taken whole
SMALLEST_SHARE = 0.25
_PARAGRAPHS = ("p", "section", "article", "header", "footer", "main", "aside", "nav", "ul", "ol", "dl", "table")
_PARAGRAPHS += ("blockquote", "pre", "figure", "figcaption", "address", "fieldset", "form", "details")
_PARAGRAPHS += ("hr", "h1", "h2", "h3", "h4", "h5", "h6", "center")
_LINES = ("div", "li", "dt", "dd", "tr", "caption", "legend", "summary", "body", "html", "thead", "tbody")
_LINES += ("tfoot", "th", "td")
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_CDATA, _XHTML = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL), "http://www.w3.org/1999/xhtml"
_TEX_SCRIPT = re.compile(r"math/tex", re.I)
# a table that lays out a page holds these
_NO_CELL = frozenset(["h1", "h2", "h3", "h4", "h5", "h6", "pre", "main", "article"])
_LONGEST_CELL = 1000
# of an item, by whoever made HTML of another format: what stands in front of it
ITEM_NUMBER = "data-item-number"


def extract_html(markup: str) -> Extracted:
    """The text of a page without its menus; all visible text where that would leave less than a quarter of it.

    Raises NoTextError if the page has no visible text.
    """
    root = parse(markup)
    if root is None:
        return _flat(markup)
    join_code_lines(root)
    parts = PageParts(root)
    if not parts.all_visible:
        raise NoTextError("the page has no visible text")
    page = page_text(parts.main, parts)
    outside = parts.all_visible - parts.visible[parts.main]
    if page.visible - page.removed.total() < SMALLEST_SHARE * parts.all_visible:
        page, outside = page_text(parts.root, None), 0
        page.notes.append("its main part is not known: all visible text was taken")
    if outside:
        page.visible += outside
        page.removed[MENUS] += outside
    kept = 1 - page.removed.total() / max(1, page.visible)
    if kept < 0.5:
        page.notes.append(f"{kept:.0%} of its visible text were kept, the rest are menus, headers and footers")
    return page


def parse(markup: str) -> Element | None:
    """The root element; None where libxml2 leaves text out, which it does below 2,048 open elements.

    Raises NoTextError for what holds no element at all.
    """
    from lxml import etree, html

    parser = html.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True, no_network=True)
    if markup.lstrip()[:5] == "<?xml" or _XHTML in markup[:2048]:  # HTML itself has no such sections
        markup = _CDATA.sub(lambda match: escape(match[1]), markup)
    content = markup.replace("\0", "\ufffd").encode("utf-8", "replace")
    try:
        root = html.document_fromstring(content, parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError, AssertionError) as error:
        if any("memory" in entry.message.lower() for entry in parser.error_log) or "memory" in str(error).lower():
            raise MemoryError from error
        raise NoTextError("the page has no visible text") from error
    messages = [entry.message.lower() for entry in parser.error_log]
    if any("memory alloc" in message for message in messages):
        raise MemoryError
    return None if any("depth" in message for message in messages) else root


def page_text(root: Element, parts: PageParts | None) -> Extracted:
    """The text below an element; `parts` says which of it to leave out, None leaves out nothing that is visible."""
    walker = _Walker(parts)
    walker.walk(root)
    walker.removed = +walker.removed
    visible = walker.written + walker.removed.total()
    notes = [f"{walker.hidden:,} characters that the page hides were left out"] if walker.hidden else []
    return Extracted.whole(walker.blocks.text(), visible=visible, removed=walker.removed, notes=notes)


class _Characters(HTMLParser):
    """The visible characters of a page, without its structure."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in NOT_TEXT and not self._skipped:
            self._skipped = tag
        self.parts.append("\n" if tag in _PARAGRAPHS or tag in _LINES else "")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._skipped:
            self._skipped = ""

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data)


def _flat(markup: str) -> Extracted:
    parser = _Characters()
    parser.feed(markup)
    parser.close()
    lines = [" ".join(line.split()) for line in "".join(parser.parts).split("\n")]
    text = "\n".join(line for line in lines if line)
    note = "its elements are nested too deeply to be told apart: all visible text was taken"
    return Extracted.whole(text, visible=visible_characters(text), notes=[note])


class _Walker:
    def __init__(self, parts: PageParts | None):
        self.parts, self.blocks = parts, TextBlocks()
        self.written, self.removed, self.hidden = 0, Counter[str](), 0
        self._lists: list[list[Any]] = []
        # for each open table: whether it lays out the page, and for each column how many rows a cell above reaches down
        self._tables: list[tuple[bool, list[int]]] = []
        self._columns: list[int] = []

    def walk(self, root: Element) -> None:
        """Depth first; an element is on the stack once to be opened and once to be closed."""
        stack: list[tuple[Element, bool]] = [(root, False)]
        while stack:
            element, is_open = stack.pop()
            if is_open:
                self._close(element)
            elif self._is_left_out(element):
                pass
            elif element.tag == "math":
                self._formula(element)
            else:
                self._open(element)
                self._text(element.text)
                stack.append((element, True))
                stack += [(child, False) for child in reversed(element)]
                continue
            if element is not root:
                self._text(element.tail)

    def _is_left_out(self, element: Element) -> bool:
        if element.tag == "script" and _TEX_SCRIPT.match(element.get("type") or ""):
            self.blocks.inline(f"${' '.join((element.text or '').split())}$")
            return True
        if element.tag == "input" and _is_task(element):
            self.blocks.inline("[ ] " if element.get("checked") is None else "[x] ")
            return True
        if is_not_text(element):
            self.removed[DRAWN] += drawn_characters(element)
            self.hidden += hidden_characters(element)
            return True
        if self.parts is not None and element is not self.parts.main and self.parts.is_boilerplate(element):
            self.removed[MENUS] += self.parts.visible[element]
            return True
        return False

    def _text(self, text: str | None) -> None:
        if text:
            self.written += visible_characters(text)
            self.blocks.inline(text)

    def _formula(self, element: Element) -> None:
        text = formula_text(element)
        self.written += self.parts.visible[element] if self.parts else visible_characters("".join(element.itertext()))
        is_block = element.get("display") == "block"
        if is_block:
            self.blocks.paragraph()
        tex = next((a for a in element.iter() if "tex" in (a.get("encoding") or "")), None)
        self.blocks.inline(f"${text}$" if tex is not None else text)
        if is_block:
            self.blocks.paragraph()

    def _open(self, element: Element) -> None:
        tag, blocks = element.tag, self.blocks
        if tag in _PARAGRAPHS and not (self._lists and tag in ("ul", "ol", "dl", "p")):
            blocks.paragraph()
        elif tag in _LINES or tag in _PARAGRAPHS:
            blocks.line()
        if tag in _HEADINGS:
            blocks.prefix(_HEADINGS[tag])
        elif tag in ("ul", "ol", "dl"):
            self._lists.append([tag, _number(element.get("start"), 1), element.get("type", "1")])
            blocks.indent(len(self._lists) > 1)
        elif tag == "li":
            self._item(element)
        elif tag == "dd":
            blocks.indent(True)
        elif tag == "pre":
            blocks.begin_code(_language(element))
        elif tag == "br":
            blocks.line_break()
        elif tag == "table":
            is_layout = _lays_out(element)
            self._tables.append((is_layout, []))
            self._columns.append(0)
            if not is_layout:
                blocks.begin_table(nested=blocks.in_cell)
        elif tag in ("tr", "td", "th") and self._tables and not self._tables[-1][0]:
            self._open_cell(element)
        elif tag == "sup" and _is_exponent(element):
            blocks.inline("^")
        elif tag == "q":
            blocks.inline("“")
        elif tag == "rt" and not any(sibling.tag == "rp" for sibling in element.itersiblings()):
            blocks.inline("(")

    def _close(self, element: Element) -> None:
        tag, blocks = element.tag, self.blocks
        if tag == "pre":
            blocks.end_code()
        elif tag in ("ul", "ol", "dl") and self._lists:
            self._lists.pop()
            blocks.dedent()
        elif tag == "dd" or tag == "li":
            blocks.dedent()
        elif tag == "table" and self._tables:
            is_layout, _ = self._tables.pop()
            self._columns.pop()
            if not is_layout:
                blocks.end_table()
        elif tag in ("td", "th") and self._tables and not self._tables[-1][0]:
            blocks.end_cell()
        elif tag == "tr" and self._tables and not self._tables[-1][0]:
            self._fill_row()
            blocks.end_row()
        elif tag == "q":
            blocks.inline("”")
        elif tag == "rt" and not any(sibling.tag == "rp" for sibling in element.itersiblings()):
            blocks.inline(")")
        if tag in _PARAGRAPHS and not (self._lists and tag in ("ul", "ol", "dl", "p")):
            blocks.paragraph()
        elif tag in _LINES or tag in _PARAGRAPHS:
            blocks.line()

    def _item(self, element: Element) -> None:
        mark = f"{element.get(ITEM_NUMBER)} " if element.get(ITEM_NUMBER) else "- "
        if self._lists and self._lists[-1][0] == "ol" and not element.get(ITEM_NUMBER):
            number = _number(element.get("value"), self._lists[-1][1])
            self._lists[-1][1] = number + 1
            mark = f"{_counted(number, element.get('type') or self._lists[-1][2])}. "
        self.blocks.prefix(mark)
        self.blocks.indent(False)

    def _open_cell(self, element: Element) -> None:
        spans = self._tables[-1][1]
        if element.tag == "tr":
            self._columns[-1] = 0
            self.blocks.begin_row()
            return
        self._skip_spanned()
        column = self._columns[-1]
        # a cell stands in its row once, however many columns it says to span
        rows = min(_number(element.get("rowspan"), 1), 10_000)
        if rows > 1:
            spans += [0] * (column + 1 - len(spans))
            spans[column] = rows
        self._columns[-1] += 1
        self.blocks.begin_cell()

    def _skip_spanned(self) -> None:
        spans = self._tables[-1][1]
        while self._columns[-1] < len(spans) and spans[self._columns[-1]] > 0:
            self.blocks.begin_cell()
            self.blocks.end_cell()
            self._columns[-1] += 1

    def _fill_row(self) -> None:
        self._skip_spanned()
        spans = self._tables[-1][1]
        spans[:] = [max(0, rows - 1) for rows in spans]


def _lays_out(table: Element) -> bool:
    """Whether a table only puts parts of a page beside each other."""
    if table.get("role") in ("presentation", "none"):
        return True
    for element in table.iter():
        if element.tag in _NO_CELL:
            return True
        if element.tag in ("td", "th") and len(element) and sum(map(len, element.itertext())) > _LONGEST_CELL:
            return True
    return False


def _language(pre: Element) -> str:
    for element in (pre, *pre.iter("code"), *([pre.getparent()] if pre.getparent() is not None else [])):
        if match := re.search(
            r"(?:^|\s)(?:language|lang|highlight-source|highlight|brush)[-:]\s*([\w+#]+)", element.get("class") or ""
        ):
            return match[1]
    return ""


def _is_task(box: Element) -> bool:
    """Whether a box to tick says whether an item of a list is done."""
    if (box.get("type") or "").lower() != "checkbox":
        return False
    names = [e.get("class") or "" for e in (box, *itertools.islice(box.iterancestors(), 3))]
    return any("task-list" in name or "contains-task" in name for name in names)


def _counted(number: int, kind: str) -> str:
    """The number of an item as its list counts: 3, c, C, iii or III."""
    if kind in ("a", "A") and 0 < number <= 26:
        return chr(ord(kind) + number - 1)
    if kind in ("i", "I") and 0 < number < 40:
        roman = "x" * (number // 10) + ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix")[number % 10]
        return roman.upper() if kind == "I" else roman
    return str(number)


def _is_exponent(element: Element) -> bool:
    return len(element) == 0 and bool(re.fullmatch(r"\s*[-+−–]?(?:\d+|[a-z])\s*", element.text or ""))


def _number(value: str | None, default: int) -> int:
    return int(value) if value and re.fullmatch(r"\s*-?\d{1,9}\s*", value) else default
