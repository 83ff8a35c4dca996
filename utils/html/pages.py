"""Templates in which everything is escaped, and the page around them.

The page forbids itself to load or run anything (its Content-Security-Policy), so that a text that got past the escaping
would still do nothing.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils.html import numbers

UTILS = Path(__file__).resolve().parents[1]
# what no page may hold: control characters but tab and newline, halves of surrogate pairs, non-characters
_UNPRINTABLE = {
    **{code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"},
    **{code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0xD800, 0xE000), 0xFFFE, 0xFFFF)},
}


def render(template: str, **values: Any) -> str:
    """A page from a template below `utils/`. A name that the template asks for and nobody gave is an error."""
    return _environment().get_template(template).render(**values)


def shell(title: str, body: Markup | str) -> str:
    """A page around a body that is HTML already."""
    return render("html/base.html.jinja", title=title, body=Markup(body))


def printable(value: Any) -> Any:
    """Text without what a page may not hold; control characters become visible. Anything else is left as it is."""
    if isinstance(value, str) and not value.isprintable():
        cleaned = value.replace("\r\n", "\n").translate(_UNPRINTABLE)
        return Markup(cleaned) if isinstance(value, Markup) else cleaned
    return value


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(UTILS),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("nats", "gain", "share", "perplexity", "probability", "general", "size", "span"):
        environment.filters[name] = functools.partial(_figure, getattr(numbers, name))
    environment.globals["exact"] = numbers.exact
    environment.tests["figure"] = numbers.is_number
    return environment


def _figure(form: Any, value: Any) -> Markup:
    return numbers.exact(value, form)
