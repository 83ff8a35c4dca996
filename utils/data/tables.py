"""Rows out of tables: jsonl, json, csv, tsv, parquet, workbooks and hub datasets, each with the place it came from.

Reads one file or hub dataset row by row, writes nothing. What is wrong goes into a `ProblemList`, so that a person sees
every bad line of every file at once and not one per run.

`datasets.load_dataset` reads hub datasets here, but not local tables: its json and csv builders forget line numbers,
its csv builder turns "NA" into null and "007" into 7, and a `[` in a path becomes a glob pattern.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import BUILT_IN_TASKS, DataSection
from utils.data.tabular.binary_rows import parquet_rows, workbook_rows
from utils.data.tabular.delimited import delimited_rows
from utils.data.tabular.json_rows import json_rows, jsonl_rows
from utils.data.tabular.text_lines import BAD_BYTES, COMPRESSED, Complain, PlacedRow, whole_text
from utils.exceptions import DataError, Problem, path_fix

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLE_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet")
WORKBOOK_SUFFIXES = (".xlsx", ".xls", ".xlsb", ".ods")
# what labelled pairs are read from, and each kind of text in gz, zst, bz2 or xz
PAIR_SUFFIXES = (*TABLE_SUFFIXES, *WORKBOOK_SUFFIXES)
HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHOWN_PROBLEMS = 20
SHOWN_CHARACTERS = 80
# tokenising takes 150 bytes of memory per character: 2.5 GB for the longest document, where 100 MB would take 15
LONGEST_DOCUMENT = 1 << 24


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
        self.has_bad_bytes = False
        """Whether bytes that are not UTF-8 were complained of, which is done once a file."""

    def __len__(self) -> int:
        return len(self._shown) + self._hidden

    @property
    def shown(self) -> tuple[Problem, ...]:
        """The first 20 of them."""
        return tuple(self._shown)

    def add(self, what: str, value: object = None, fix: str = "") -> None:
        """Record one problem; a long value is cut to 80 characters."""
        self.has_bad_bytes |= BAD_BYTES in what
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

    def claim(self, name: str) -> str:
        """The name as an id, or the first free "name~N"."""
        claimed, number = name, self._last.get(digest16(name), 1)
        while digest16(claimed) in self._taken:
            number += 1
            claimed = f"{name}~{number}"
        if number > 1:
            self._last[digest16(name)] = number
        self._taken.add(digest16(claimed))
        return claimed


def iter_rows(path: Path, problems: ProblemList) -> Iterator[TableRow]:
    """The rows of a local table, chosen by suffix (`table_suffix`); blank lines are skipped.

    A line that cannot be read goes into `problems` with file and line number, and reading goes on behind it.
    Raises KeyError for a suffix that is not in PAIR_SUFFIXES: the caller decides what such a file means.
    """
    reader = _READERS[table_suffix(path)]
    try:
        yield from (TableRow(*row) for row in reader(path, problems.add))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = "compress it again" if path.suffix.lower() in COMPRESSED else "check the path and its permissions"
        problems.add(f"{path}: cannot be read: {reason}", fix=fix)


def table_suffix(path: Path) -> str:
    """The suffix that says how a table is read: ".jsonl" of "a.jsonl.gz"."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix in COMPRESSED and inner in _TEXT_SUFFIXES else suffix


def is_text_table(source: str) -> bool:
    """Whether every cell of a table is a text: csv and its kind, and workbooks."""
    return table_suffix(Path(source)) in (".csv", ".tsv", *WORKBOOK_SUFFIXES)


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
        split_name = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
        if split_name not in splits:
            problems.add(f"{source}: has no split {split_name!r}", sorted(splits), "name one of these splits")
            return
        for number, values in enumerate(splits[split_name], 1):
            yield TableRow(f"{source} [{split_name}] row {number}", number, dict(values))
    except Exception as error:  # noqa: BLE001 - network, hub and builder raise dozens of types; all mean "not readable"
        problems.add(
            f"{source} at {revision}: cannot be read from the hub",
            f"{type(error).__name__}: {error}",
            "check name, commit, network and HF_TOKEN; of a dataset with several configs name one: org/name:config",
        )


def is_hub_id(source: str) -> bool:
    """Whether the text has the form of a hub dataset id; "data/faq.jsonl" has it too, but names a file."""
    return HUB_ID.fullmatch(source) is not None and Path(source).suffix.lower() not in TABLE_SUFFIXES


def missing(data: DataSection) -> list[Problem]:
    """Each source that is no built-in domain, no path and cannot be a hub dataset."""
    sources = [*data.corpus, *data.corpus_heldout, data.task, data.task_dev, data.task_test]
    named = [source for source in sources if source and source != "none" and source not in BUILT_IN_TASKS]
    absent = [s for s in named if not Path(s).expanduser().exists() and not is_hub_id(s.partition(":")[0])]
    return [Problem(f"{source!r} does not exist", fix=path_fix(source)) for source in absent]


def read_text(path: Path, problems: ProblemList) -> str:
    """A whole UTF-8 file (a BOM is accepted); bad bytes and NUL go into `problems` with their line."""
    return whole_text(path, problems.add)


def digest16(text: str) -> bytes:
    """16 bytes of sha256: enough to tell 10**12 texts apart, small enough to keep one per document."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def shorten(value: object) -> object:
    """A value for an error message: None and numbers as they are, anything else as at most 80 characters."""
    if value is None or isinstance(value, (int, float)):
        return value
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


_READERS: dict[str, Callable[[Path, Complain], Iterator[PlacedRow]]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": delimited_rows,
    ".tsv": delimited_rows,
    ".parquet": parquet_rows,
    **dict.fromkeys(WORKBOOK_SUFFIXES, workbook_rows),
}
