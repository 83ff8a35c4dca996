"""The lines of a text file, compressed or not, as UTF-8 (UTF-16 where its first bytes say so), with their numbers."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any, BinaryIO, Protocol

# a table of one long line is read whole, so it has to fit the memory several times
LONGEST_LINE = 1 << 29
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# rows that are looked at to tell what a table is like
SAMPLE = 30
# rows below a line of its own that show that it is no name of a column
FEWEST_BELOW = 3
BAD_BYTES = "not UTF-8"
ABOVE = "rows above the names of the columns are passed over"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

PlacedRow = tuple[str, int, dict[str, Any]]
"""Where a row stands ("faq.csv:12"), its number, its columns."""


def rows_above(rows: Sequence[Sequence[Any]]) -> int:
    """How many rows stand above the names of a table's columns: a title, a date, what a program says of an export.

    They fill at most half as many cells as most rows do and not the last one, or are a single cell above rows that are
    all longer and of one length.
    """
    lines = next((at for at, row in enumerate(rows) if len(row) > 1), 0)
    if lines and len(rows) - lines >= FEWEST_BELOW and len({len(row) for row in rows[lines:]}) == 1:
        return lines
    filled = [sum(str(cell).strip() != "" for cell in row) for row in rows]
    usual = median_low(filled or [0])
    is_title = [2 * n <= usual and not str(row[-1]).strip() for n, row in zip(filled, rows, strict=True)]
    return next((at for at, flag in enumerate(is_title) if not flag), 0)


class Complain(Protocol):
    """Takes one problem: what, the value to blame, and what to do about it."""

    def __call__(self, what: str, value: object = None, fix: str = "") -> None: ...


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, of one in gz, zst, bz2 or xz what it holds. Raises OSError, EOFError or ValueError."""
    readers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # type: ignore[arg-type]
    return readers.get(suffix, lambda plain: plain.open("rb"))(path)


def lines(path: Path, complain: Complain) -> Iterator[tuple[int, str]]:
    """(number, line with its end); bad bytes, NUL and a line that is too long are complained of, once for each kind."""
    # one complaint of each kind per file: the fix is to convert the file, and 1,000 lines would bury the other files
    bad_bytes = bad_nul = False
    for number, raw in enumerate(_raw_lines(path), 1):
        if len(raw) > LONGEST_LINE:
            complain(f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes", fix="break it up")
            return
        raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if not bad_bytes:
                what = f"{path}:{number}: {BAD_BYTES}, at byte {error.start + 1} of the line"
                fix = "iconv -f <its encoding> -t UTF-8 (Excel writes WINDOWS-1252, or save it as CSV UTF-8)"
                complain(what, raw[error.start : error.start + 4].hex(" "), fix)
            bad_bytes, text = True, raw.decode("utf-8", "replace")
        if "\0" in text:
            if not bad_nul:
                fix = "it is binary or UTF-16: convert it to UTF-8 text, or take it out of the sources"
                complain(f"{path}:{number}: contains a NUL byte", fix=fix)
            bad_nul, text = True, text.replace("\0", "")
        # a bad line is handed on all the same: the csv reader counts lines, and a problem stops the run; where it does
        # not, documents with marks are left out
        yield number, text


def whole_text(path: Path, complain: Complain) -> str:
    """The whole file."""
    return "".join(text for _, text in lines(path, complain))


def first_text(path: Path) -> str:
    """The first line that is not blank, without a word about what is wrong with it."""
    return next((text.strip() for _, text in lines(path, say_nothing) if text.strip()), "")


def say_nothing(what: str, value: object = None, fix: str = "") -> None:
    """For a first look: the reading itself complains of the same bytes."""


def _raw_lines(path: Path) -> Iterator[bytes]:
    with opened(path) as file:
        start = file.readline(LONGEST_LINE + 1)
        if start.startswith(_UTF16):
            with opened(path) as again:
                decoded = io.TextIOWrapper(again, encoding="utf-16", errors="replace", newline="")
                yield from (line.encode("utf-8") for line in decoded)
            return
        yield from filter(None, [start])
        yield from iter(lambda: file.readline(LONGEST_LINE + 1), b"")
