"""Directives and roles that docutils does not know, as text: Sphinx has some hundred, its extensions thousands.

A directive is a line of its name and argument with its content below, a role its text, as a reader of the page sees it.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive, directives, roles
from docutils.parsers.rst.languages import en
from docutils.utils import unescape

_ROLE = re.compile(r":([A-Za-z][\w:+.-]*):`")
_DIRECTIVE = re.compile(r"^[ \t]*\.\.[ \t]+(?:\|[^|\n]+\|[ \t]+)?([A-Za-z][\w:+.-]*)[ \t]?::", re.MULTILINE)
_TITLED = re.compile(r"(.+?)\s*<[^<>]*>", re.DOTALL)
# docutils has these with fewer options than Sphinx
_CODE, _MATH = ("code-block", "sourcecode", "code", "prompt", "testcode", "doctest", "productionlist"), "math"
# they arrange or look up, and show nothing of their own
_NO_TEXT = (
    "toctree",
    "currentmodule",
    "module",
    "py:module",
    "py:currentmodule",
    "index",
    "highlight",
    "default-domain",
)
_NO_TEXT += ("tabularcolumns", "sectionauthor", "codeauthor", "literalinclude", "testsetup", "testcleanup")
# their argument is a place, a width or a number of columns, and their content the text
_ONLY_CONTENT = ("glossary", "only", "ifconfig", "tab-set", "tabs", "grid", "hlist", "container", "rst-class")
# their argument is a sentence, here with what Sphinx writes in front of it; that of others is code, as a signature is
_SENTENCES = {"versionadded": "Added in version ", "versionchanged": "Changed in version ", "seealso": ""}
_SENTENCES |= {"deprecated": "Deprecated since version ", "rubric": "", "tab": "", "tab-item": "", "dropdown": ""}
_SENTENCES |= {"centered": "", "todo": "", "impl-detail": "", "card": "", "grid-item-card": ""}


class _AnyOption(dict):  # type: ignore[type-arg]
    """Options of any name, with any value."""

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        return lambda value: value


class _Unknown(Directive):
    optional_arguments, final_argument_whitespace, has_content = 1, True, True
    option_spec: ClassVar[Any] = _AnyOption()

    def run(self) -> list[nodes.Node]:
        name, words = self.name.lower(), "\n".join(self.arguments)
        if name in _NO_TEXT:
            return []
        if name in (*_CODE, _MATH):
            block = nodes.math_block if name == _MATH else nodes.literal_block
            text = "\n".join([*([words] if words and name == _MATH else []), *self.content])
            return [block(text, text)] if text else []
        heads: list[nodes.Node] = []
        if name in _SENTENCES and words:
            heads.append(nodes.paragraph(words, "", *self.state.inline_text(_SENTENCES[name] + words, self.lineno)[0]))
        elif words and name not in _ONLY_CONTENT:
            heads += [nodes.paragraph(line, line) for line in words.split("\n")]
        below = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, below)
        return [*heads, *below.children]


def register(source: str) -> None:
    """Let docutils read the directives and roles of this text that it does not know, and those of Sphinx's own kind."""
    known = {*directives._directive_registry, *directives._directives, *en.directives}
    for name in {*_CODE, _MATH, *(n.lower() for n in _DIRECTIVE.findall(source) if n.lower() not in known)}:
        directives.register_directive(name, _Unknown)
    known = {*roles._role_registry, *roles._roles, *en.roles}
    for name in {n.lower() for n in _ROLE.findall(source)} - known:
        roles.register_local_role(name, _role)


def _role(
    name: str, rawtext: str, text: str, lineno: int, inliner: Any, options: Any = None, content: Any = None
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """The title of `title <target>`, the last part of `~package.module.name`, else the text itself."""
    shown = unescape(text)
    if titled := _TITLED.fullmatch(shown):
        shown = titled[1]
    elif shown.startswith("~"):
        shown = shown.rpartition(".")[2].lstrip("~")
    return [nodes.inline(rawtext, shown.lstrip("!"))], []
