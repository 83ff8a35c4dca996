"""Code that a page shows line by line in a table or in boxes (GitHub's view of a file), put back into one element.

As cells its lines would lose the blanks at their beginnings, which mean something in code.
"""

from __future__ import annotations

from typing import Any

Element = Any
_LINE_OF_TABLE, _LINE_OF_BOX = "blob-code", "react-file-line"


def join_code_lines(root: Element) -> None:
    """Make one `pre` of the lines of each such view; cells for the numbers of lines, which are empty, go."""
    for table in list(root.iter("table")):
        for cell in [c for c in table.iter("td") if c.get("data-line-number") and not "".join(c.itertext()).strip()]:
            cell.getparent().remove(cell)
        lines = [cell for cell in table.iter("td") if _has_class(cell, _LINE_OF_TABLE)]
        if lines and len(lines) == sum(1 for _ in table.iter("tr")):
            texts = ["".join(line.itertext()).removesuffix("\n") for line in lines]
            del table[:]
            table.tag, table.text = "pre", "\n".join(texts)
    for line in [e for e in root.iter("div") if _has_class(e, _LINE_OF_BOX)]:
        line.tag, line.tail = "span", "\n"
        line.getparent().tag = "pre"


def _has_class(element: Element, name: str) -> bool:
    return name in (element.get("class") or "").split()
