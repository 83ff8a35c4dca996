"""Text of a PDF file: its text layer, page by page."""

from __future__ import annotations

import re
from pathlib import Path

from utils.data.extraction.extracted import Extracted, NoTextError

# only before a small letter: "Graeco-\nRoman" keeps its hyphen
_HYPHENATION = re.compile(r"(?<=[^\W\d_])[-\u00ad\u2010][ \t]*\n[ \t]*(?=[^\W\d_A-Z])")


def extract_pdf(path: Path) -> Extracted:
    """The text layer, page by page, words hyphenated at a line end joined.

    Raises NoTextError if the file is encrypted, damaged or a scan, ImportError if pypdf is not installed.
    """
    from pypdf import PdfReader

    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise NoTextError("the PDF is encrypted; save it without a password")
        pages = [page.extract_text() for page in reader.pages]
    except NoTextError:
        raise
    except Exception as error:
        raise NoTextError(f"the PDF cannot be parsed ({type(error).__name__}: {error})") from error
    text = _HYPHENATION.sub("", "\n\n".join(page.strip("\n") for page in pages if page.strip()))
    if not text.strip():
        raise NoTextError(
            f"none of the PDF's {len(pages)} pages has a text layer; it may be a scan: run OCR on it first"
        )
    return Extracted.whole(text)
