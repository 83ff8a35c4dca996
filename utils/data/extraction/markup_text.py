"""reStructuredText and LaTeX as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.data.extraction.cleaning import decode
from utils.data.extraction.extracted import Extracted
from utils.data.extraction.pages.html_text import page_text, parse

# docutils' level of what it could not understand: unknown directives and roles, of Sphinx for example
NOT_UNDERSTOOD = 3
_TITLES = {
    **{"part": "#", "chapter": "#", "section": "##", "subsection": "###", "subsubsection": "####", "title": "#"},
    **{"paragraph": "#####", "subparagraph": "######", "author": "", "date": ""},
}
_AS_WRITTEN = ("cite", "citet", "citep", "ref", "eqref", "pageref", "autoref", "cref")
_NO_TEXT = (
    "documentclass",
    "usepackage",
    "maketitle",
    "includegraphics",
    "label",
    "bibliographystyle",
    "tableofcontents",
)


def extract_rst(path: Path) -> Extracted:
    """A document without its markup; as it is written where docutils does not know all of its directives and roles.

    Nothing that the file names is opened: no includes, no raw markup of other languages.
    """
    from docutils.core import publish_doctree, publish_from_doctree

    source, encoding = decode(path.read_bytes())
    notes = [f"read as {encoding}"] if encoding else []
    settings = {
        "file_insertion_enabled": False,
        "raw_enabled": False,
        "report_level": 5,
        "halt_level": 5,
        "_disable_config": True,
        "syntax_highlight": "none",
        "embed_stylesheet": False,
        "math_output": "mathml",
        "line_length_limit": 1 << 24,
    }
    tree = publish_doctree(source, settings_overrides=settings)
    if any(message.attributes.get("level", 0) >= NOT_UNDERSTOOD for message in _messages(tree)):
        return Extracted.whole(source, notes=notes)
    markup = publish_from_doctree(tree, writer="html5", settings_overrides=settings).decode("utf-8")
    root = parse(markup)
    text = page_text(root, None).documents[0][1] if root is not None else ""
    return Extracted.whole(text or source, notes=notes)


def extract_tex(path: Path) -> Extracted:
    """The words of a LaTeX file; formulas and macros that are not known stay as they are written.

    Files that it includes are files of their own.
    """
    from pylatexenc.latex2text import LatexNodes2Text

    source, encoding = decode(path.read_bytes())
    options = {"math_mode": "verbatim", "keep_comments": False, "strict_latex_spaces": False}
    converter = LatexNodes2Text(latex_context=_latex_context(), **options)
    text = converter.latex_to_text(source, tolerant_parsing=True)
    return Extracted.whole(text, notes=[f"read as {encoding}"] if encoding else [])


def _latex_context() -> object:
    from pylatexenc.latex2text import EnvironmentTextSpec, MacroTextSpec, get_default_latex_context_db

    def titled(mark: str) -> Callable[..., str]:
        return lambda node, l2tobj: f"\n\n{mark} {l2tobj.nodelist_to_text(node.nodeargd.argnlist[-1:]).strip()}\n"

    def as_written(node: Any) -> str:
        return node.latex_verbatim()

    context = get_default_latex_context_db()
    macros = [MacroTextSpec(name, titled(mark)) for name, mark in _TITLES.items()]
    macros += [MacroTextSpec(name, as_written) for name in _AS_WRITTEN]
    macros += [MacroTextSpec(name, "") for name in _NO_TEXT]
    code = [EnvironmentTextSpec(name, as_written) for name in ("verbatim", "lstlisting", "minted", "alltt")]
    context.add_context_category("kept", prepend=True, macros=macros, environments=code)
    context.set_unknown_macro_spec(MacroTextSpec("", as_written))
    return context


def _messages(tree: object) -> list:
    from docutils import nodes

    return [*tree.findall(nodes.system_message), *getattr(tree, "parse_messages", [])]
