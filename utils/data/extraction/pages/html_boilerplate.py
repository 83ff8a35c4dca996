"""Which parts of a page are not its text: menus, headers, footers, cookie notices, what only a script would show.

By HTML's own elements and ARIA roles first; by the usual words in `class` and `id` only where the part looks like a
menu, too: links, or a few words.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from utils.data.extraction.extracted import visible_characters

Element = Any

# no text of the page: never shown, or shown as something else
NOT_TEXT = frozenset(
    [
        "script",
        "style",
        "template",
        "head",
        "noscript",
        "svg",
        "canvas",
        "audio",
        "video",
        "object",
        "embed",
        "iframe",
        "frameset",
        "map",
        "datalist",
        "button",
        "select",
        "textarea",
        "input",
        "option",
        "clipboard-copy",
    ]
)
# the text is another time on the page, or a documentation's theme put it there for a mouse
_DOUBLED = re.compile(
    r"(?:^|\s)(?:katex-html|MathJax_Preview|MathJax_CHTML|headerlink|anchorjs-link|test-arrow|linenos|linenodiv|lineno"
    r"|gutter|sr-only|visually-hidden|screen-reader-text|clipboard-copy|copybtn)(?:\s|$)"
)
_ROLES = frozenset(["navigation", "banner", "contentinfo", "search", "menu", "menubar", "dialog", "alertdialog"])
_LANDMARKS = frozenset(["footer", "header", "aside"])
# in these a header or an aside belongs to the text
_OF_TEXT = frozenset(["article", "main", "section", "blockquote", "figure"])
_NAMED = frozenset(["div", "ul", "ol", "aside", "header", "footer", "form", "p", "table", "span"])
_NOTICE = re.compile(r"(?:^|[\s_-])(?:cookies?|consent|gdpr|ccpa)(?:$|[\s_-])", re.I)
_MENU = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navigation|menu|sidebar|breadcrumbs?|footer|masthead|topbar|pagination|pager|share"
    r"|sharing|social|advert|advertisement|newsletter|subscribe|promo|popup|modal|related|skip-?link|skip-?to-?\w*"
    r"|prev-?next|next-?prev|rst-versions|edit-page|toc|table-of-contents)(?:$|[\s_-])",
    re.I,
)
_HIDING = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)
_UNFOLDS = re.compile(
    r"(?:^|[\s_-])(?:tabs?|tab-?panes?|tab-?contents?|tabpanel|expand|expander|collapse|collapsible|accordion|details"
    r"|spoiler|toggle|folded|unfold)(?:$|[\s_-])",
    re.I,
)
_LARGEST_SHARE = 0.5
_SHORT, _LINKS_SHARE, _NOTICE_CHARACTERS, _MENU_ITEM = 80, 0.5, 1500, 25
_MAIN_SHARE = 0.4


class PageParts:
    """A parsed page: how much text each element holds, which one is the main part, what to leave out of it."""

    def __init__(self, root: Element):
        self.root = root
        elements = list(root.iter())
        # characters other than blanks that a reader sees, of all text and of links
        self.visible: dict[Element, int] = defaultdict(int)
        self._links: dict[Element, int] = defaultdict(int)
        for element in reversed(elements):
            own = 0 if is_not_text(element) else self.visible[element] + visible_characters(element.text or "")
            self.visible[element] = own
            if element.tag == "a":
                self._links[element] = own
            if element is not root:
                parent = element.getparent()
                self.visible[parent] += own + visible_characters(element.tail or "")
                self._links[parent] += self._links[element] if own else 0
        self.all_visible = self.visible[root]
        marked = [e for e in elements if e.tag == "main" or e.get("role") == "main"]
        marked = marked or [e for e in elements if e.tag == "article"]
        self.main = self._main(marked)
        # what holds the main part, or the title of the page, is no menu
        self._holders = {parent for e in elements if e in marked or e.tag == "h1" for parent in e.iterancestors()}

    def is_boilerplate(self, element: Element) -> bool:
        """Whether a part is a menu, header, footer or notice."""
        tag, role = element.tag, (element.get("role") or "").lower()
        if tag in ("html", "body", "main", "article") or role == "main":
            return False
        if tag == "nav" or role in _ROLES:
            return True
        size, inside = self.visible[element], self.main is not self.root
        if tag in _LANDMARKS and not inside and element not in self._holders:
            return not any(parent.tag in _OF_TEXT for parent in element.iterancestors())
        if tag not in _NAMED or element in self._holders or size > _LARGEST_SHARE * self.all_visible:
            return False
        names = f"{element.get('class', '')} {element.get('id', '')}"
        if size <= _NOTICE_CHARACTERS and _NOTICE.search(names):
            return True
        links = self._links[element]
        # a chapter that is called "menu" has the word as its name, too
        if "section" not in names.split() and _MENU.search(names):
            return size <= _SHORT or links >= _LINKS_SHARE * size
        is_list_of_links = tag in ("ul", "ol") and len(element) > 2 and links >= 0.95 * size
        return is_list_of_links and not inside and size <= _MENU_ITEM * len(element)

    def _main(self, marked: list[Element]) -> Element:
        """The one main part that holds much of what is visible; else the whole page."""
        largest = max(marked, key=self.visible.__getitem__, default=self.root)
        return largest if self.visible[largest] >= _MAIN_SHARE * self.all_visible else self.root


def is_not_text(element: Element) -> bool:
    """Whether nothing below an element is text that a reader sees, or all of it is on the page another time."""
    if not isinstance(element.tag, str) or element.tag in NOT_TEXT:
        return True
    return bool((names := element.get("class")) and _DOUBLED.search(names)) or _is_hidden(element)


def hidden_characters(element: Element) -> int:
    """Characters below an element that only its style hides."""
    if not isinstance(element.tag, str) or element.tag in NOT_TEXT or not _is_hidden(element):
        return 0
    texts = (e.text for e in element.iter() if isinstance(e.tag, str) and e.tag not in NOT_TEXT)
    tails = (e.tail for e in element.iterdescendants())
    return sum(visible_characters(text or "") for text in (*texts, *tails))


def drawn_characters(element: Element) -> int:
    """Characters that a drawing shows, or a field that is filled in."""
    texts = element.iter("text") if element.tag == "svg" else [element] if element.tag == "textarea" else []
    return sum(visible_characters("".join(one.itertext())) for one in texts)


def _is_hidden(element: Element) -> bool:
    """Whether a page hides an element and a reader cannot open it: tabs and what unfolds are text of the page."""
    style = element.get("style")
    if element.get("hidden") is None and not (style and _HIDING.search(style)):
        return False
    return element.get("role") != "tabpanel" and not _UNFOLDS.search(
        f"{element.get('class', '')} {element.get('id', '')}"
    )
