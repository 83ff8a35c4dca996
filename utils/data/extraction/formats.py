"""The formats that are read, by suffix, and the one function that reads a file of any of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from utils.data.extraction.cleaning import cleaned
from utils.data.extraction.extracted import Extracted, NoTextError
from utils.data.extraction.text_decoding import decode, refuse_undecoded
from utils.data.tables import LONGEST_DOCUMENT

TOO_LONG, SPLIT = "too long", "split it where its parts end, into files or rows of their own"

# it is in memory as a whole
LARGEST_FILE = 1 << 29
TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".text", ".org", ".adoc", ".asciidoc", ".textile")
# source code, data and configuration: read as they are
CODE_SUFFIXES = (
    *(".py", ".pyi", ".r", ".jl", ".java", ".kt", ".scala", ".go", ".rs", ".rb", ".pl", ".pm", ".php", ".js"),
    *(".mjs", ".jsx", ".ts", ".tsx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".swift", ".m", ".hs", ".ml"),
    *(".ex", ".erl", ".clj", ".lua", ".sh", ".bash", ".zsh", ".ps1", ".bat", ".sql", ".css", ".scss", ".tcl"),
    *(".f90", ".vhd", ".v", ".sv", ".cmake", ".mk", ".gradle", ".tf", ".proto", ".graphql", ".yaml", ".yml"),
    *(".toml", ".ini", ".cfg", ".conf", ".properties", ".xml", ".xsd", ".xsl"),
)
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
XML_SUFFIXES = (".xml", ".xsd", ".xsl")
# a suffix -> (module of this package, function) that reads the file; imported when the first such file is read
_READERS: dict[str, tuple[str, str]] = {
    ".pdf": ("pdf.pdf_text", "extract_pdf"),
    ".docx": ("word_text", "extract_docx"),
    ".docm": ("word_text", "extract_docx"),
    ".odt": ("open_document", "extract_odt"),
    ".pptx": ("office_text", "extract_pptx"),
    ".xlsx": ("office_text", "extract_workbook"),
    ".xlsm": ("office_text", "extract_workbook"),
    ".xls": ("office_text", "extract_workbook"),
    ".ods": ("office_text", "extract_workbook"),
    ".epub": ("book_text", "extract_epub"),
    ".ipynb": ("book_text", "extract_notebook"),
    ".eml": ("mail_text", "extract_mail"),
    ".mbox": ("mail_text", "extract_mailbox"),
    ".srt": ("subtitles", "extract_subtitles"),
    ".vtt": ("subtitles", "extract_subtitles"),
    ".rst": ("markup.markup_text", "extract_rst"),
    ".tex": ("markup.markup_text", "extract_tex"),
    **dict.fromkeys(HTML_SUFFIXES, ("pages.html_text", "")),
}
# in a child process, under limits: what is parsed; plain text takes as long as its bytes
PARSED_SUFFIXES = tuple(_READERS)
FILE_SUFFIXES = (*TEXT_SUFFIXES, *CODE_SUFFIXES, *PARSED_SUFFIXES)


def read_file(path: Path) -> Extracted:
    """The clean text of one file of FILE_SUFFIXES.

    Raises NoTextError with the reason where there is none, ImportError if a reader's library is not installed, OSError,
    MemoryError; KeyError for another suffix.
    """
    suffix = path.suffix.lower()
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise NoTextError(f"a file of {size:,} bytes, and the largest that is read has {LARGEST_FILE:,}", kind=TOO_LONG)
    if suffix in TEXT_SUFFIXES or suffix in CODE_SUFFIXES:
        text, encoding = decode(path.read_bytes(), markup=suffix in XML_SUFFIXES)
        extracted = Extracted.whole(text)
    else:
        extracted, encoding = _parsed(path, suffix)
    if encoding:
        extracted.notes.append(f"read as {encoding}")
    return _clean(extracted)


def _parsed(path: Path, suffix: str) -> tuple[Extracted, str]:
    module, function = _READERS[suffix]
    reader = importlib.import_module(f"{__package__}.{module}")
    if suffix in HTML_SUFFIXES:
        markup, encoding = decode(path.read_bytes(), markup=True)
        return reader.extract_html(markup), encoding
    extract: Callable[[Path], Extracted] = getattr(reader, function)
    try:
        return extract(path), ""
    except (NoTextError, ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # a library's parser, and a file of anybody's making
        what = f"the {suffix[1:]} file cannot be parsed ({type(error).__name__}: {error})"
        raise NoTextError(what) from error


def _clean(extracted: Extracted) -> Extracted:
    """Every document of a file cleaned; refused when too much of it could not be decoded."""
    documents, undecoded = [], 0
    for name, text in extracted.documents:
        if len(text) > LONGEST_DOCUMENT:
            what = f"a document of {len(text):,} characters, and the longest that is read has {LONGEST_DOCUMENT:,}"
            raise NoTextError(what, kind=TOO_LONG, fix=SPLIT)
        clean = cleaned(text)
        documents.append((name, clean.text))
        extracted.cleaned.update(clean.removed)
        undecoded += clean.undecoded
    extracted.characters += sum(len(text) for _, text in extracted.documents)
    refuse_undecoded(undecoded, sum(len(text) for _, text in documents))
    extracted.documents, extracted.undecoded = documents, undecoded
    return extracted
