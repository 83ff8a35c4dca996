"""Unlabelled documents for the domain adapter: files, folders and hub datasets in, one `datasets.Dataset` out.

Reads what `--data.corpus` names, one document at a time; writes `documents.arrow` into a fresh folder under
`cache_dir`, so that the corpus may be larger than memory and an edited file is always read again. Old `documents-*`
folders there can be deleted whenever no process uses them.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.data.extraction import NoTextError, clean_text, extract_docx, extract_html, extract_pdf
from utils.data.tables import (
    LONGEST_DOCUMENT,
    TABLE_SUFFIXES,
    ProblemList,
    TableRow,
    UniqueIds,
    digest16,
    is_hub_id,
    iter_hub_rows,
    iter_rows,
    read_text,
)
from utils.exceptions import DataError, Problem

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst")
HTML_SUFFIXES = (".html", ".htm")
DOCUMENT_SUFFIXES = (*TEXT_SUFFIXES, *HTML_SUFFIXES, ".pdf", ".docx", *TABLE_SUFFIXES)
TEXT_COLUMNS = ("text", "content", "contents", "body", "document", "article", "passage", "page_content", "markdown")
LISTED_SKIPPED_FILES = 100
ROWS_PER_BATCH = 200
# an Arrow string column of one batch ends at 2 GiB: 200 long books would pass it
CHARACTERS_PER_BATCH = 64 * 2**20


@dataclass(frozen=True)
class ReadReport:
    """What was read and what was left out. `files` counts files and hub datasets; `dropped` is reason -> number."""

    files: int
    documents: int
    characters: int
    utf8_bytes: int
    dropped: dict[str, int]
    skipped_files: list[str]
    """Files out of folders that were not used, the first 100: another suffix, or no text could be extracted."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain values for a manifest."""
        return asdict(self)


def read_documents(
    sources: Sequence[str], *, cache_dir: Path, hub_revision: str | None = None
) -> tuple[Dataset, ReadReport]:
    """Read every source into a dataset with the columns `id` and `text`, both strings, ids unique, texts distinct.

    A source is a file, a folder (read recursively in sorted order without hidden files) or a hub dataset "org/name" or
    "org/name:config" pinned by `hub_revision`. Raises DataError with all problems of all sources: a path that does not
    exist, a file that is not UTF-8, a malformed row by file and line, a table without a text column, an unpinned hub
    dataset, a directly named file of unknown suffix or without text, and a corpus that is empty after all drops.
    """
    from datasets import Dataset, Features, Value
    from datasets.arrow_writer import ArrowWriter

    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="documents-", dir=cache_dir))
    arrow_path = str(folder / "documents.arrow")
    features = Features({"id": Value("string"), "text": Value("string")})
    problems, tally = ProblemList(), _Tally()
    try:
        with ArrowWriter(path=arrow_path, features=features, writer_batch_size=ROWS_PER_BATCH) as writer:
            pending_characters = 0
            for wanted_id, text in _read_sources(sources, Path(cache_dir), hub_revision, problems, tally):
                document = tally.accept(wanted_id, text)
                # once something is wrong the rest is read only to find what else is wrong
                if document is None or problems:
                    continue
                writer.write(document)
                pending_characters += len(document["text"])
                if pending_characters > CHARACTERS_PER_BATCH:
                    writer.write_examples_on_file()
                    pending_characters = 0
            problems.raise_if_any()
            if not tally.documents:
                dropped = ", ".join(f"{number} {reason}" for reason, number in tally.dropped.items()) or "nothing"
                what = f"the corpus is empty: {tally.files} files read, dropped: {dropped}"
                raise DataError(Problem(what, list(sources), "name files or folders that hold text"))
            writer.finalize()
        return Dataset.from_file(arrow_path), tally.report()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@dataclass
class _Tally:
    files: int = 0
    documents: int = 0
    characters: int = 0
    utf8_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    skipped_files: list[str] = field(default_factory=list)
    _ids: UniqueIds = field(default_factory=UniqueIds)
    _texts: set[bytes] = field(default_factory=set)

    def accept(self, wanted_id: str, raw_text: str) -> dict[str, str] | None:
        text = clean_text(raw_text)
        digest = digest16(text)
        if not text.strip() or digest in self._texts:
            self.dropped["duplicate" if text.strip() else "empty"] += 1
            return None
        self._texts.add(digest)
        self.documents += 1
        self.characters += len(text)
        self.utf8_bytes += len(text.encode("utf-8"))
        return {"id": self._ids.claim(wanted_id), "text": text}

    def skip(self, path: Path, reason: str) -> None:
        self.dropped[reason] += 1
        if len(self.skipped_files) < LISTED_SKIPPED_FILES:
            self.skipped_files.append(_printable(path))

    def report(self) -> ReadReport:
        return ReadReport(
            self.files, self.documents, self.characters, self.utf8_bytes, dict(self.dropped), self.skipped_files
        )


def _read_sources(
    sources: Sequence[str], cache_dir: Path, hub_revision: str | None, problems: ProblemList, tally: _Tally
) -> Iterator[tuple[str, str]]:
    if sum(is_hub_id(source) and not Path(source).exists() for source in sources) > 1 and hub_revision is not None:
        fix = "give one hub dataset per corpus; download the others and name their files"
        problems.add("several hub datasets, but one revision: a commit belongs to one dataset", list(sources), fix)
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir() and source.strip():
            for file in _files_below(path, problems):
                yield from _read_file(file, file.relative_to(path), problems, tally, inside_folder=True)
        elif path.is_file():
            yield from _read_file(path, Path(path.name), problems, tally, inside_folder=False)
        elif is_hub_id(source) and path.suffix.lower() not in DOCUMENT_SUFFIXES:
            tally.files += 1
            rows = iter_hub_rows(source, hub_revision, split=None, cache_dir=cache_dir, problems=problems)
            yield from _read_rows(rows, source, problems)
        else:
            fix = "correct the path; relative paths start at the folder the command is run from"
            problems.add(f"{source!r} does not exist", os.getcwd(), fix)


def _files_below(folder: Path, problems: ProblemList) -> Iterator[Path]:
    def complain(error: OSError) -> None:
        problems.add(f"{error.filename}: cannot be listed: {error.strerror}", fix="check its permissions")

    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=complain):
        # a link to a parent folder would be walked forever
        real = os.path.realpath(root)
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))
        visited.add(real)


def _read_file(
    path: Path, relative: Path, problems: ProblemList, tally: _Tally, *, inside_folder: bool
) -> Iterator[tuple[str, str]]:
    suffix = path.suffix.lower()
    if suffix not in DOCUMENT_SUFFIXES:
        if inside_folder:
            tally.skip(path, f"suffix {suffix or '(none)'} not read")
        else:
            fix = f"convert it to one of {' '.join(DOCUMENT_SUFFIXES)}"
            problems.add(f"{_printable(path)}: files of this kind are not read", suffix, fix)
        return
    tally.files += 1
    try:
        if path.stat().st_size == 0:
            tally.dropped["empty"] += 1
        elif suffix in TABLE_SUFFIXES:
            yield from _read_rows(iter_rows(path, problems), _printable(relative), problems)
        else:
            text = _read_one(path, suffix, problems)
            if _is_short_enough(text, _printable(path), problems):
                yield _printable(relative), text
    except NoTextError as error:
        if inside_folder:
            logger.warning("%s: no text could be extracted: %s", _printable(path), error)
            tally.skip(path, "no text could be extracted")
        else:
            problems.add(
                f"{_printable(path)}: no text could be extracted: {error}", fix="or take it out of the sources"
            )
    except ImportError as error:
        fix = "install what the message names, or: pip install -r requirements.txt"
        problems.add(f"{_printable(path)}: the reader of {suffix} files cannot be imported", str(error), fix)
    except OSError as error:
        fix = "check the path and its permissions"
        problems.add(f"{_printable(path)}: cannot be read: {error.strerror or error}", fix=fix)


def _read_one(path: Path, suffix: str, problems: ProblemList) -> str:
    if suffix == ".pdf":
        return extract_pdf(path)
    if suffix == ".docx":
        return extract_docx(path)
    text = read_text(path, problems)
    return extract_html(text) if suffix in HTML_SUFFIXES and text.strip() else text


def _read_rows(rows: Iterable[TableRow], label: str, problems: ProblemList) -> Iterator[tuple[str, str]]:
    has_complained = False
    for row in rows:
        column = _text_column(row.values)
        if column is None:
            if not has_complained:  # the other rows of the table most likely lack it too
                fix = f"name the column with the text 'text' (also read: {', '.join(TEXT_COLUMNS[1:])})"
                problems.add(f"{row.place}: no text column", f"columns {', '.join(map(str, row.values))}", fix)
            has_complained = True
            continue
        text = row.values[column]
        if text is not None and not isinstance(text, str):
            what = f"{row.place}: {column!r} is a {type(text).__name__}, not text"
            problems.add(what, text, "write one string per row, or null to leave the row out")
            continue
        identity = row.values.get("id")
        if _is_short_enough(text or "", row.place, problems):
            yield (f"{label}#{row.number}" if identity in (None, "") else str(identity)), text or ""


def _is_short_enough(text: str, place: str, problems: ProblemList) -> bool:
    if len(text) <= LONGEST_DOCUMENT:
        return True
    what = f"{place}: a document of {len(text):,} characters, and the longest that is read has {LONGEST_DOCUMENT:,}"
    problems.add(what, fix="split it where its parts end, into files or rows of their own")
    return False


def _text_column(values: dict[str, Any]) -> str | None:
    names = {str(name).strip().lower(): name for name in values}
    found = next((name for name in TEXT_COLUMNS if name in names), None)
    # in a file of labelled examples `document` is a name, and training on names would look like success
    return None if found is None or (found == "document" and "question" in names) else names[found]


def _printable(path: Path) -> str:
    # a file name need not be UTF-8 on Linux, an Arrow string must be
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")
