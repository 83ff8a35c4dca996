"""Rows out of tables: jsonl, json, csv, tsv, parquet and hub datasets, each row with the place it came from.

Reads one file or hub dataset row by row, writes nothing. What is wrong goes into a `ProblemList`, so that a person sees
every bad line of every file at once and not one per run.

`datasets.load_dataset` reads hub datasets here, but not local tables: its json and csv builders forget line numbers,
its csv builder turns "NA" into null and "007" into 7, and a `[` in a path becomes a glob pattern.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.exceptions import DataError, Problem

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHOWN_PROBLEMS = 20
SHOWN_CHARACTERS = 80
# tokenising takes 150 bytes of memory per character: 2.5 GB for the longest document, where 100 MB would take 15
LONGEST_DOCUMENT = 1 << 24
# a table of one long line is read whole, so it has to fit the memory several times
LONGEST_LINE = 1 << 29


@dataclass(frozen=True)
class TableRow:
    """One row: `place` as a person finds it ("faq.csv:12"), `number` its line (in a json list, parquet or hub: row)."""

    place: str
    number: int
    values: dict[str, Any]


class ProblemList:
    """Collects problems over many files and raises them together, the first 20 in full and the rest as a number."""

    def __init__(self) -> None:
        self._shown: list[Problem] = []
        self._hidden = 0

    def __len__(self) -> int:
        return len(self._shown) + self._hidden

    @property
    def shown(self) -> tuple[Problem, ...]:
        """The first 20 of them."""
        return tuple(self._shown)

    def add(self, what: str, value: object = None, fix: str = "") -> None:
        """Record one problem; a long value is cut to 80 characters."""
        if len(self._shown) < SHOWN_PROBLEMS:
            self._shown.append(Problem(what, shorten(value), fix))
        else:
            self._hidden += 1

    def raise_if_any(self) -> None:
        """Raise DataError with everything recorded so far; return if there is nothing."""
        if self._shown:
            raise DataError([*self._shown, *([Problem(f"and {self._hidden} more")] if self._hidden else [])])


class UniqueIds:
    """Hands out every id once: a repeated "a" becomes "a~2", "a~3". Keeps 16 bytes per id, not the id."""

    def __init__(self) -> None:
        self._taken: set[bytes] = set()
        self._last: dict[bytes, int] = {}

    def claim(self, wanted: str) -> str:
        """The wanted id, or the first free "wanted~N"."""
        claimed, number = wanted, self._last.get(digest16(wanted), 1)
        while digest16(claimed) in self._taken:
            number += 1
            claimed = f"{wanted}~{number}"
        if number > 1:
            self._last[digest16(wanted)] = number
        self._taken.add(digest16(claimed))
        return claimed


def iter_rows(path: Path, problems: ProblemList) -> Iterator[TableRow]:
    """The rows of a local table, chosen by suffix; blank lines are skipped.

    A line that cannot be read goes into `problems` with file and line number, and reading goes on behind it.
    Raises KeyError for a suffix that is not in TABLE_SUFFIXES: the caller decides what such a file means.
    """
    reader = _READERS[path.suffix.lower()]
    try:
        yield from reader(path, problems)
    except OSError as error:
        problems.add(f"{path}: cannot be read: {error.strerror or error}", fix="check the path and its permissions")


def iter_hub_rows(
    source: str, revision: str | None, *, split: str | None, cache_dir: Path, problems: ProblemList
) -> Iterator[TableRow]:
    """The rows of hub dataset "org/name" or "org/name:config", streamed; without `split`: "train", or the only split.

    The revision must be a commit of 40 hex digits: a branch name would read other data tomorrow. Remote code never
    runs. What cannot be read goes into `problems`.
    """
    match = HUB_ID.fullmatch(source)
    if match is None or COMMIT.fullmatch(revision or "") is None:
        problems.add(
            f"{source!r} is no file or folder here, and as a hub dataset it is not pinned to a commit",
            revision,
            "correct the path; or give the dataset's commit, 40 hex digits, as the hub revision "
            f"(git ls-remote https://huggingface.co/datasets/{source.partition(':')[0]} HEAD)",
        )
        return
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(match["name"], match["config"], revision=revision, cache_dir=str(cache_dir))
        pinned = re.compile(rf"hf://datasets/[\w.-]+/[\w.-]+@{revision}/(?!.*\.\./)")
        named = [str(file) for listed in (builder.config.data_files or {}).values() for file in listed]
        if strays := [file for file in named if not pinned.match(file)]:
            # its README may name any path or address, of this machine too, and no commit pins those
            fix = "download what you trust, and name those files"
            problems.add(f"{source} at {revision}: takes files from outside of that commit", strays[:3], fix)
            return
        splits = builder.as_streaming_dataset()
        wanted = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
        if wanted not in splits:
            problems.add(f"{source}: has no split {wanted!r}", sorted(splits), "name one of these splits")
            return
        for number, values in enumerate(splits[wanted], 1):
            yield TableRow(f"{source} [{wanted}] row {number}", number, dict(values))
    except Exception as error:  # noqa: BLE001 - network, hub and builder raise dozens of types; all mean "not readable"
        problems.add(
            f"{source} at {revision}: cannot be read from the hub",
            f"{type(error).__name__}: {error}",
            "check name, commit, network and HF_TOKEN; of a dataset with several configs name one: org/name:config",
        )


def is_hub_id(source: str) -> bool:
    """Whether the text has the form of a hub dataset id; "data/faq.jsonl" has it too, but names a file."""
    return HUB_ID.fullmatch(source) is not None and Path(source).suffix.lower() not in TABLE_SUFFIXES


def read_text(path: Path, problems: ProblemList) -> str:
    """A whole UTF-8 file (a BOM is accepted); bad bytes and NUL go into `problems` with their line."""
    return "".join(text for _, text in _lines(path, problems))


def digest16(text: str) -> bytes:
    """16 bytes of sha256: enough to tell 10**12 texts apart, small enough to keep one per document."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def shorten(value: object) -> object:
    """A value for an error message: None and numbers as they are, anything else as at most 80 characters."""
    if value is None or isinstance(value, (int, float)):
        return value
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _lines(path: Path, problems: ProblemList) -> Iterator[tuple[int, str]]:
    # one complaint of each kind per file: the fix is to convert the file, and 1,000 lines would bury the other files
    bad_bytes = bad_nul = False
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(raw) > LONGEST_LINE:
                problems.add(f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes", fix="break it up")
                return
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                if not bad_bytes:
                    what = f"{path}:{number}: not UTF-8, at byte {error.start + 1} of the line"
                    problems.add(what, raw[error.start : error.start + 4].hex(" "), "iconv -f <its encoding> -t UTF-8")
                bad_bytes, text = True, raw.decode("utf-8", "replace")
            if "\0" in text:
                if not bad_nul:
                    fix = "it is binary or UTF-16: convert it to UTF-8 text, or take it out of the sources"
                    problems.add(f"{path}:{number}: contains a NUL byte", fix=fix)
                bad_nul, text = True, text.replace("\0", "")
            # a bad line is handed on all the same: the csv reader counts lines, and a problem stops the run anyway
            yield number, text


def _jsonl_rows(path: Path, problems: ProblemList) -> Iterator[TableRow]:
    for number, line in _lines(path, problems):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            end = "" if line.endswith("\n") else "; the file ends inside this line, so it may be truncated"
            problems.add(f"{place}: not valid JSON: {error}{end}", line.strip(), "write one JSON object per line")
            continue
        yield from _checked(place, number, value, problems)


def _json_rows(path: Path, problems: ProblemList) -> Iterator[TableRow]:
    # peeked with a list of its own: the real reading below reports the same bad byte again
    first = next((text.strip() for _, text in _lines(path, ProblemList()) if text.strip()), "")
    if first.startswith("{") and _is_json(first):
        yield from _jsonl_rows(path, problems)
        return
    try:
        value = json.loads(read_text(path, problems) or "[]")
    except (ValueError, RecursionError) as error:
        # in a list, or an object over many lines, one slip would make every line a complaint
        if first.startswith("{") and first != "{":
            yield from _jsonl_rows(path, problems)
        else:
            fix = "write a JSON list of objects, or one object per line"
            problems.add(f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON: {error}", fix=fix)
        return
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield from _checked(f"{path}, row {number}", number, item, problems)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _checked(place: str, number: int, value: object, problems: ProblemList) -> Iterator[TableRow]:
    if not isinstance(value, dict):
        problems.add(f"{place}: a {type(value).__name__}, not an object", value, 'write {"column": value, ...}')
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        fix = r"a \ud800-\udfff escape stands alone: write both halves, or the character itself"
        problems.add(f"{place}: half of a surrogate pair, which no UTF-8 text can hold", fix=fix)
        return
    yield TableRow(place, number, value)


def _csv_rows(path: Path, problems: ProblemList) -> Iterator[TableRow]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell above 128 KiB, and a document is easily longer
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader((text for _, text in _lines(path, problems)), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = 'put a cell that holds a quote or a line break between "", and double the quotes inside it'
            problems.add(f"{path}:{number}: not valid {path.suffix[1:].upper()}: {error}", fix=fix)
            return
        if not cells:
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            if repeated := sorted(name for name, times in Counter(header).items() if times > 1):
                problems.add(f"{path}:{number}: a column name twice", repeated, "rename the columns in the first line")
        elif len(cells) != len(header):
            what = f"{path}:{number}: {len(cells)} cells, but the first line names {len(header)} columns"
            problems.add(what, delimiter.join(cells), f"quote a cell that contains {delimiter!r}")
        else:
            yield TableRow(f"{path}:{number}", number, dict(zip(header, cells, strict=True)))


def _parquet_rows(path: Path, problems: ProblemList) -> Iterator[TableRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=200):
                for values in batch.to_pylist():
                    number += 1
                    yield TableRow(f"{path}, row {number}", number, values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        problems.add(f"{path}: not readable as parquet after row {number}", str(error), "write the file again")


_READERS: dict[str, Callable[[Path, ProblemList], Iterator[TableRow]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
