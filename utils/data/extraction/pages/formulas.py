"""Formulas as one line of text: MathML of web pages and OMML of Word files, walked by the names of their elements.

`(a+b)/2`, `x_1^2`, `sqrt(x)`, `sum_(i=1)^n i`: what a person would type. TeX that a formula carries wins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Element = Any
_SKIPPED = {"annotation", "annotation-xml", "mspace", "none", "mprescripts", "mphantom"}
_DEEPEST = 200


def formula_text(element: Element, depth: int = 0) -> str:
    """The formula below an element of either language (an lxml element), in one line."""
    name = local_name(element)
    if name in _SKIPPED or name.endswith("Pr") or depth > _DEEPEST:
        return ""
    children = [child for child in element if isinstance(child.tag, str)]
    if name == "semantics":
        tex = next((c for c in children if "tex" in (c.get("encoding") or "")), None)
        if tex is not None and (tex.text or "").strip():
            return " ".join(tex.text.split())
    parts = [formula_text(child, depth + 1) for child in children if local_name(child) not in _SKIPPED]
    if name in _OMML:
        named = {local_name(child): formula_text(child, depth + 1) for child in children}
        return _OMML[name](element, named)
    if name in _MATHML and len(parts) >= _MATHML[name][0]:
        return _MATHML[name][1](*parts[: _MATHML[name][0]])
    if name == "msqrt":
        return f"sqrt({''.join(parts)})"
    if name in ("mtable", "m", "eqArr"):
        return "; ".join(parts) if name == "eqArr" else f"[{'; '.join(parts)}]"
    if name in ("mtr", "mr"):
        return ", ".join(parts)
    if name == "mfenced":
        return f"{element.get('open', '(')}{', '.join(parts)}{element.get('close', ')')}"
    if name == "d":
        return _delimited(element, [part for part in parts if part])
    return (" ".join((element.text or "").split()) if not children else "") + "".join(parts)


def local_name(element: Element) -> str:
    """A tag without its namespace; "" of comments."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _grouped(part: str) -> str:
    return part if len(part) <= 1 or part.isalnum() or (part[0], part[-1]) == ("(", ")") else f"({part})"


def _script(base: str, below: str = "", above: str = "") -> str:
    return base + (f"_{_grouped(below)}" if below else "") + (f"^{_grouped(above)}" if above else "")


def _property(element: Element, kind: str, name: str, default: str) -> str:
    for child in element.iterdescendants():
        if local_name(child) == name and local_name(child.getparent()) == f"{kind}Pr":
            return next(iter(child.attrib.values()), default)
    return default


def _delimited(element: Element, parts: list[str]) -> str:
    opening, closing = _property(element, "d", "begChr", "("), _property(element, "d", "endChr", ")")
    return f"{opening}{', '.join(parts)}{closing}"


_MATHML: dict[str, tuple[int, Callable[..., str]]] = {
    "mfrac": (2, lambda above, below: f"{_grouped(above)}/{_grouped(below)}"),
    "msup": (2, lambda base, above: _script(base, "", above)),
    "msub": (2, lambda base, below: _script(base, below)),
    "msubsup": (3, _script),
    "munder": (2, lambda base, below: _script(base, below)),
    "mover": (2, lambda base, above: _script(base, "", above)),
    "munderover": (3, _script),
    "mroot": (2, lambda base, degree: f"root_{_grouped(degree)}({base})"),
}
_OMML: dict[str, Callable[[Element, dict[str, str]], str]] = {
    "f": lambda _, part: f"{_grouped(part.get('num', ''))}/{_grouped(part.get('den', ''))}",
    "sSup": lambda _, part: _script(part.get("e", ""), "", part.get("sup", "")),
    "sSub": lambda _, part: _script(part.get("e", ""), part.get("sub", "")),
    "sSubSup": lambda _, part: _script(part.get("e", ""), part.get("sub", ""), part.get("sup", "")),
    "sPre": lambda _, part: _script("", part.get("sub", ""), part.get("sup", "")) + part.get("e", ""),
    "rad": lambda _, part: (
        f"root_{_grouped(part['deg'])}({part.get('e', '')})" if part.get("deg") else f"sqrt({part.get('e', '')})"
    ),
    "nary": lambda element, part: _script(_nary(element), part.get("sub", ""), part.get("sup", ""))
    + f" {part.get('e', '')}",
    "limLow": lambda _, part: _script(part.get("e", ""), part.get("lim", "")),
    "limUpp": lambda _, part: _script(part.get("e", ""), "", part.get("lim", "")),
    "func": lambda _, part: f"{part.get('fName', '')}({part.get('e', '')})",
}


def _nary(element: Element) -> str:
    return _property(element, "nary", "chr", "∫")
