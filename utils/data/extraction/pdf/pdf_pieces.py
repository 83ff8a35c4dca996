"""Characters of a PDF page by pdfium, put together to pieces: words and phrases that stand close together in a row.

Coordinates are in points, from the lower left corner; of text that is set sideways they are turned, so that every piece
runs from left to right. What a font does not say is U+FFFD.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from utils.data.extraction.text_decoding import MARK

# in shares of the height of a line: a wider gap ends a piece, a gap is a blank, an overlap of less is another row.
# Letters of a spaced heading stand far from each other, too, but in one text object; there pdfium knows the blanks
WIDEST_BLANK, WIDEST_SPACED, WIDEST_GAP, BLANK_GAP, SAME_ROW = 1.2, 2.0, 0.9, 0.3, 0.5
# pdfium's own marks for a hyphen at a line end
_HYPHENS = frozenset([0x02, 0xFFFE])
# Symbol's and Wingdings' bullets
_KNOWN = {0xAD: "\u00ad", 0xF0B7: "•", 0xF0A7: "▪", 0xF0D8: "➢", 0xF0FC: "✓", 0xF06F: "o"}
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
# the first Hebrew character: no script before it runs to the left
_FIRST_RTL = "\u0590"
_LARGE_IMAGE, _FEW_CHARACTERS = 0.5, 50
IMAGE_OBJECT = 3
# in quarters of a turn: text that is set aslant, as watermarks are, is no row of the page
_ASLANT, _UPRIGHT = 4, 0.1


@dataclass
class TextPiece:
    """Text that stands together, and its box."""

    x0: float
    x1: float
    y0: float
    y1: float
    characters: list[tuple[float, str]] = field(default_factory=list)
    is_rtl: bool = False

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    @property
    def text(self) -> str:
        """From left to right, also where the script runs the other way."""
        characters = sorted(self.characters, key=lambda c: c[0]) if self.is_rtl else self.characters
        return "".join(text for _, text in characters).strip()


@dataclass
class PdfPage:
    """The pieces of a page, the upright ones first, whether it looks like a picture of text, and what is set aslant."""

    pieces: list[list[TextPiece]]
    is_picture: bool
    is_blank: bool
    aslant: list[str] = field(default_factory=list)


def read_page(page: Any) -> PdfPage:
    """The text of an open page of pypdfium2."""
    text_page = page.get_textpage()
    try:
        turned: dict[int, list[TextPiece]] = defaultdict(list)
        count = 0
        for quarter, piece in _pieces(text_page):
            turned[quarter].append(piece)
            count += len(piece.characters)
    finally:
        text_page.close()
    aslant = [piece.text for piece in turned.pop(_ASLANT, [])]
    groups = sorted(turned.values(), key=lambda group: -sum(len(p.characters) for p in group))
    has_objects = False
    is_picture = False
    if count < _FEW_CHARACTERS:
        images = list(page.get_objects(filter=[IMAGE_OBJECT], max_depth=3))
        has_objects = bool(images) or next(iter(page.get_objects(max_depth=1)), None) is not None
        area = max(1.0, page.get_width() * page.get_height())
        is_picture = any(_area(image) >= _LARGE_IMAGE * area for image in images) or (not count and has_objects)
    return PdfPage(groups, is_picture, is_blank=not count and not has_objects, aslant=aslant)


def _pieces(text_page: Any) -> Iterator[tuple[int, TextPiece]]:
    current: TextPiece | None = None
    turned = 0
    blank = False
    owner = None
    for character, quarter, text_object, (x0, y0, x1, y1) in _characters(text_page):
        if character == " ":
            blank = True
            if current is not None:
                current.characters.append((x0, " "))
            continue
        is_rtl = character >= _FIRST_RTL and unicodedata.bidirectional(character[0]) in ("R", "AL")
        is_same_object, owner = text_object == owner, text_object
        widest = WIDEST_BLANK if blank else WIDEST_SPACED if is_same_object else WIDEST_GAP
        is_near = quarter != _ASLANT and _belongs(current, x0, x1, y0, y1, widest, is_rtl) if current else False
        if current is not None and quarter == turned and (is_near or (quarter == _ASLANT and is_same_object)):
            gap = max(x0 - current.x1, current.x0 - x1)
            if not blank and not is_same_object and gap > BLANK_GAP * current.height:
                current.characters.append((min(x0, current.x1), " "))
            current.x0, current.x1 = min(current.x0, x0), max(current.x1, x1)
            current.y0, current.y1 = min(current.y0, y0), max(current.y1, y1)
        else:
            if current is not None and current.text:
                yield turned, current
            current, turned = TextPiece(x0, x1, y0, y1), quarter
        current.characters.append((x0, character))
        current.is_rtl = current.is_rtl or is_rtl
        blank = False
    if current is not None and current.text:
        yield turned, current


def _belongs(piece: TextPiece, x0: float, x1: float, y0: float, y1: float, widest: float, is_rtl: bool) -> bool:
    height = max(min(piece.height, y1 - y0), 0.1)
    if min(piece.y1, y1) - max(piece.y0, y0) < SAME_ROW * height:
        return False
    # the letters of a ligature have one box
    if -1.3 * height <= x0 - piece.x1 <= widest * height and x1 >= piece.x1 - 0.5 * height:
        return True
    return (is_rtl or piece.is_rtl) and -0.5 * height <= piece.x0 - x1 <= widest * height


def _characters(text_page: Any) -> Iterator[tuple[str, int, int, tuple[float, float, float, float]]]:
    """(character, quarter turns, text object, box) in the order of the file."""
    import ctypes

    from pypdfium2 import raw

    # a page has thousands of characters: plain numbers for pointers, the box as an array, what an object has asked once
    page, values = text_page.raw, (ctypes.c_float * 4)()
    box = ctypes.cast(values, ctypes.POINTER(raw.FS_RECTF))
    object_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)(
        ctypes.cast(raw.FPDFText_GetTextObject, ctypes.c_void_p).value or 0
    )
    address = ctypes.cast(page, ctypes.c_void_p)
    code_of, box_of, has_no_mapping = (
        raw.FPDFText_GetUnicode,
        raw.FPDFText_GetLooseCharBox,
        raw.FPDFText_HasUnicodeMapError,
    )
    high = quarter = 0
    text_object = -1
    for index in range(text_page.count_chars()):
        code = code_of(page, index)
        if code == 0x0D or code == 0x0A:
            continue
        if 0xD800 <= code < 0xE000:
            if code < 0xDC00:
                high = code
                continue
            if high:
                code, high = 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00), 0
        box_of(page, index, box)
        x0, y1, x1, y0 = values
        owner = object_of(address, index) or 0
        # blanks that pdfium adds belong to no object, and have no angle of their own
        if owner != text_object or not owner:
            text_object = owner
            turns = raw.FPDFText_GetCharAngle(page, index) / 1.5707963
            quarter = round(turns) % 4 if abs(turns - round(turns)) <= _UPRIGHT else _ASLANT
        if quarter == 1:
            x0, y0, x1, y1 = -y1, x0, -y0, x1
        elif quarter == 2:
            x0, y0, x1, y1 = -x1, -y1, -x0, -y0
        elif quarter == 3:
            x0, y0, x1, y1 = y0, -x1, y1, -x0
        if code in _HYPHENS and raw.FPDFText_IsHyphen(page, index) == 1:
            character = "-"
        else:
            character = _character(code)
            if not character:
                character = MARK if has_no_mapping(page, index) == 1 else chr(code)
        yield character, quarter, text_object, (x0, y0, x1, y1)


def _character(code: int) -> str:
    """A blank, a mark, or a character that stands for others; "" for a plain one."""
    if 0x20 < code < 0x7F:
        return ""
    if code in (0x20, 0xA0, 0x09) or 0x2000 <= code <= 0x200A or code == 0x3000:
        return " "
    if replacement := _KNOWN.get(code) or _LIGATURES.get(code):
        return replacement
    is_no_character = (
        code < 0x20
        or 0x7F <= code < 0xA0
        or 0xE000 <= code <= 0xF8FF
        or 0xD800 <= code < 0xE000
        or code == 0xFFFE
        or code >= 0x110000
    )
    return MARK if is_no_character else ""


def _area(image: Any) -> float:
    left, bottom, right, top = image.get_bounds()
    return (right - left) * (top - bottom)
