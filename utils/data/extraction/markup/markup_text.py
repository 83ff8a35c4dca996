"""reStructuredText and LaTeX as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.data.extraction.extracted import Extracted
from utils.data.extraction.markup import tex_macros
from utils.data.extraction.pages.html_text import page_text, parse
from utils.data.extraction.text_decoding import decode

# docutils' level of what it could not understand
NOT_UNDERSTOOD = 3
_TITLES = {
    **{"part": "#", "chapter": "#", "section": "##", "subsection": "###", "subsubsection": "####", "title": "#"},
    **{"paragraph": "#####", "subparagraph": "######", "author": "", "date": "", "caption": ""},
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
    *("hline", "toprule", "midrule", "bottomrule", "centering", "noindent", "newpage", "clearpage", "appendix"),
)


def extract_rst(path: Path) -> Extracted:
    """A document without its markup, Sphinx's included; as it is written where text would be lost otherwise.

    Nothing that the file names is opened: no includes, no raw markup of other languages.
    """
    from docutils.core import publish_doctree, publish_from_doctree

    from utils.data.extraction.markup import sphinx_markup

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
    sphinx_markup.register(source)
    tree = publish_doctree(source, settings_overrides=settings)
    if any(_loses_text(message) for message in _messages(tree)):
        return Extracted.whole(source, notes=[*notes, "its markup cannot be read: it is taken as it is written"])
    markup = publish_from_doctree(tree, writer="html5", settings_overrides=settings).decode("utf-8")
    root = parse(markup)
    text = page_text(root, None).documents[0][1] if root is not None else ""
    return Extracted.whole(text or source, notes=notes)


def extract_tex(path: Path) -> Extracted:
    """The words of a LaTeX file, with its own macros written out; formulas and unknown macros stay as they are written.

    Files that it includes are files of their own.
    """
    source, encoding = decode(path.read_bytes())
    options = {"math_mode": "verbatim", "keep_comments": False, "strict_latex_spaces": False}
    notes = [f"read as {encoding}"] if encoding else []
    prepared = tex_macros.written_out(tex_macros.with_whole_addresses(source))
    converter = _converter()(latex_context=_latex_context(), **options)
    try:
        text = converter.latex_to_text(prepared, tolerant_parsing=True, latex_context=_walker_context())
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # known macros without their arguments
        return Extracted.whole(source, notes=[*notes, "its markup cannot be read: it is taken as it is written"])
    return Extracted.whole(text, notes=notes)


def _converter() -> Any:
    """pylatexenc's converter to text, for which what stands in braces behind an unknown macro belongs to it."""
    from pylatexenc.latex2text import LatexNodes2Text
    from pylatexenc.latexwalker import LatexCharsNode, LatexGroupNode, LatexMacroNode

    class Converter(LatexNodes2Text):
        def nodelist_to_text(self, nodelist: Any) -> str:
            merged: list[Any] = []
            open_macro = False
            for node in nodelist or []:
                is_group = isinstance(node, LatexGroupNode) and node.delimiters[0] == "{"
                if open_macro and is_group:
                    merged.append(LatexCharsNode(node.latex_verbatim(), parsing_state=node.parsing_state))
                    continue
                merged.append(node)
                is_macro = isinstance(node, LatexMacroNode) and not node.macro_post_space
                open_macro = is_macro and not self.latex_context.get_macro_spec(node.macroname).macroname
            return super().nodelist_to_text(merged)

    return Converter


def _walker_context() -> object:
    """What pylatexenc knows of arguments, and those of `href`, without which it fails (its issue 58)."""
    from pylatexenc.latexwalker import get_default_latex_context_db
    from pylatexenc.macrospec import MacroSpec

    context = get_default_latex_context_db()
    context.add_context_category("links", prepend=True, macros=[MacroSpec("href", "{{")])
    return context


def _latex_context() -> object:
    from pylatexenc.latex2text import EnvironmentTextSpec, MacroTextSpec, get_default_latex_context_db

    def titled(mark: str) -> Callable[..., str]:
        before = f"{mark} ".lstrip()
        return lambda node, l2tobj: f"\n\n{before}{l2tobj.nodelist_to_text(node.nodeargd.argnlist[-1:]).strip()}\n"

    def as_written(node: Any) -> str:
        return node.latex_verbatim()

    context = get_default_latex_context_db()
    macros = [MacroTextSpec(name, titled(mark)) for name, mark in _TITLES.items()]
    macros += [MacroTextSpec(name, as_written) for name in _AS_WRITTEN]
    macros += [MacroTextSpec(name, "") for name in _NO_TEXT]
    macros.append(MacroTextSpec("href", lambda node, l2tobj: l2tobj.nodelist_to_text(node.nodeargd.argnlist[1:])))
    code = [EnvironmentTextSpec(name, as_written) for name in ("verbatim", "lstlisting", "minted", "alltt")]
    context.add_context_category("kept", prepend=True, macros=macros, environments=code)
    context.set_unknown_macro_spec(MacroTextSpec("", as_written))
    return context


def _loses_text(message: Any) -> bool:
    """Whether a complaint stands for a block that is in no other place; a reference without a target is still there."""
    from docutils import nodes

    level = message.attributes.get("level", 0)
    return level > NOT_UNDERSTOOD or (level == NOT_UNDERSTOOD and any(message.findall(nodes.literal_block)))


def _messages(tree: object) -> list:
    from docutils import nodes

    return [*tree.findall(nodes.system_message), *getattr(tree, "parse_messages", [])]
