"""Bytes to text: which encoding a file has, and how many of its characters may be lost.

What cannot be decoded becomes U+FFFD, the mark of Unicode for it.
"""

from __future__ import annotations

import codecs
import re

from utils.data.extraction.extracted import NoTextError

MARK = "\ufffd"
# of a text: above it, it is refused by name
MOST_UNDECODED = 0.05
NOT_UTF8, NOT_DECODED = "not UTF-8", "too many characters could not be decoded"
_DECLARED = re.compile(
    rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]+)|<meta[^>]{0,400}?charset\s*=\s*["']?\s*([\w.:-]+)""", re.I
)
# PEP 263 and Emacs in the first lines; LaTeX in its preamble
_COOKIE = re.compile(rb"coding[:=][ \t]*([\w.-]+)")
_LATEX = re.compile(rb"\\usepackage\s*\[([\w-]+)\]\s*\{inputenc\}|%\s*!TEX\s+encoding\s*=\s*([\w-]+)", re.I)
# names that Python does not know
_ALIASES = {"ansinew": "cp1252", "applemac": "mac-roman", "iso-8859-8-i": "iso-8859-8", "windows-949": "cp949"}
_ALIASES |= {"windows-31j": "cp932"}
# what a browser understands by an encoding, by the name that Python gives it
_AS_BROWSERS = {
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
}


def refuse_undecoded(undecoded: int, characters: int) -> None:
    """Raises NoTextError when more than MOST_UNDECODED of a text's characters are marks."""
    if undecoded > MOST_UNDECODED * max(1, characters):
        reason = f"{undecoded:,} of {characters:,} characters could not be decoded"
        fix = "its font or encoding does not tell them: run OCR on it, or convert it to UTF-8, or leave it out"
        raise NoTextError(reason, kind=NOT_DECODED, fix=fix)


def decode(content: bytes, *, markup: bool = False) -> tuple[str, str]:
    """(text, the encoding if it is not UTF-8): by byte order mark, as UTF-8, or as the file itself declares.

    `markup` reads the declarations of HTML and XML, and without one windows-1252, as browsers do. Raises NoTextError
    with the line of the first byte that is not UTF-8.
    """
    for mark, encoding in ((b"\xef\xbb\xbf", ""), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32")):
        if content.startswith(mark):
            return content[0 if encoding else 3 :].decode(encoding or "utf-8", "replace"), encoding
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace"), "utf-16"
    if unmarked := _unmarked_utf16(content[:4096]):
        return content.decode(unmarked, "replace"), unmarked
    try:
        return content.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        declared = _declared(content, markup)
        if declared:
            return content.decode(declared, "replace"), declared
        line = content.count(b"\n", 0, error.start) + 1
        at = error.start - content.rfind(b"\n", 0, error.start)
        bad = content[error.start : error.start + 4].hex(" ")
        fix = "iconv -f <its encoding> -t UTF-8"
        raise NoTextError(
            f"not UTF-8, at byte {at} of the line (got {bad!r})", kind=NOT_UTF8, place=f":{line}", fix=fix
        ) from None


def _unmarked_utf16(start: bytes) -> str:
    """UTF-16 that has no byte order mark, as some databases write it: every other byte of most texts is 0."""
    even_zeros, odd_zeros = (start[at::2].count(0) / max(1, len(start) // 2) for at in (0, 1))
    if max(even_zeros, odd_zeros) < 0.4 or min(even_zeros, odd_zeros) > 0.05:
        return ""
    return "utf-16-le" if odd_zeros > even_zeros else "utf-16-be"


def _declared(content: bytes, markup: bool) -> str:
    if markup:
        match = _DECLARED.search(content[:4096])
    else:
        match = _COOKIE.search(content[:256]) or _LATEX.search(content[:16384])
    name = next((group for group in match.groups() if group), b"").decode().lower() if match else ""
    # it says UTF-8 and is not: the bytes that are not show as marks. Without a name a page is windows-1252
    return _as_python(name) or ("cp1252" if markup else "")


def _as_python(name: str) -> str:
    """The codec for a declared name, as a browser understands it; "" for a name of none."""
    for spelled in (_ALIASES.get(name, name), name.removeprefix("x-")):
        try:
            known = codecs.lookup(spelled).name
            # "a" alone is no UTF-16, which such a file cannot be, and some names are of no text codec
            if spelled and b"a".decode(known) == "a":
                return _AS_BROWSERS.get(known, known)
        except (LookupError, UnicodeDecodeError, TypeError, ValueError):
            continue
    return ""
