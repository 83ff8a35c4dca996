"""Unlabelled documents for the domain adapter: files, folders and hub datasets in, one `datasets.Dataset` out.

Reads what `--data.corpus` names, in its order; writes `documents.arrow` into a fresh folder under `cache_dir`, so that
the corpus may be larger than memory and an edited file is always read again. Old `documents-*` folders there can be
deleted whenever no process uses them. Files that have to be parsed are read side by side, see `extraction.pool`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.data.corpus.first_look import Look, LookAhead, files_below
from utils.data.corpus.read_report import EMPTY, ReadReport, ReadTally, printable_path
from utils.data.corpus.text_rows import NO_COLUMN, text_rows
from utils.data.extraction.extracted import NO_TEXT, NoTextError
from utils.data.extraction.formats import FILE_SUFFIXES, PARSED_SUFFIXES, read_file
from utils.data.extraction.pool import ExtractionPool, Reading, usable_cores
from utils.data.tables import (
    TABLE_SUFFIXES,
    ProblemList,
    is_hub_id,
    iter_hub_rows,
    iter_rows,
)
from utils.exceptions import DataError, Problem, path_fix

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENT_SUFFIXES = (*FILE_SUFFIXES, *(suffix for suffix in TABLE_SUFFIXES if suffix not in FILE_SUFFIXES))
ROWS_PER_BATCH = 200
# an Arrow string column of one batch ends at 2 GiB: 200 long books would pass it
CHARACTERS_PER_BATCH = 64 * 2**20
# files that are read ahead of the one whose turn it is; their texts are in memory
AHEAD_PER_WORKER = 8
BAD_ROW = "malformed rows"


@dataclass(frozen=True)
class ReadLimits:
    """How files that cannot be read are treated, and what one file may take."""

    on_unreadable: str = "auto"
    """skip, stop, or auto: skip inside a folder, stop for a source that was named itself."""
    file_seconds: float = 60
    file_memory_mb: int = 2048
    workers: int = 0
    """Processes that read files side by side; 0 is one for each core."""


def read_documents(
    sources: Sequence[str],
    *,
    cache_dir: Path,
    hub_revision: str | None = None,
    limits: ReadLimits | None = None,
    on_first_look: Callable[[Look], None] | None = None,
) -> tuple[Dataset, ReadReport]:
    """Read every source into a dataset with the columns `id` and `text`, both strings, ids unique, texts distinct.

    A source is a file, a folder (read recursively in sorted order without hidden files) or a hub dataset "org/name" or
    "org/name:config" pinned by `hub_revision`. What cannot be read is skipped, counted and named, or stops the run, as
    `limits` say. Raises DataError with all problems of all sources: a path that does not exist, an unreadable file or
    row that is not skipped, a table without a text column, an unpinned hub dataset, a directly named file of unknown
    suffix or without text, a reader that cannot be imported, and a corpus that is empty after all drops.
    """
    from datasets import Dataset, Features, Value
    from datasets.arrow_writer import ArrowWriter

    limits = limits or ReadLimits()
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="documents-", dir=cache_dir))
    arrow_path = str(folder / "documents.arrow")
    features = Features({"id": Value("string"), "text": Value("string")})
    reader = _Reader(limits, LookAhead(sources, on_first_look))
    problems, tally = reader.problems, reader.tally
    try:
        with ArrowWriter(path=arrow_path, features=features, writer_batch_size=ROWS_PER_BATCH) as writer, reader.look:
            pending_characters = 0
            with closing(reader.read(sources, Path(cache_dir), hub_revision)) as documents:
                for document in documents:
                    # once something is wrong the rest is read only to find what else is wrong
                    if problems:
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
                shown = [Problem(line) for line in tally.unreadable[:5]]
                raise DataError([Problem(what, list(sources), "name files or folders that hold text"), *shown])
            writer.finalize()
        return Dataset.from_file(arrow_path), tally.report()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    inside_folder: bool
    reading: Reading | None


class _Reader:
    """Reads sources one after the other, what must be parsed ahead of its turn in child processes."""

    def __init__(self, limits: ReadLimits, look: LookAhead):
        self.limits, self.look = limits, look
        self.problems, self.tally = ProblemList(), ReadTally()
        workers = limits.workers or usable_cores()
        self._pool = ExtractionPool(workers, seconds=limits.file_seconds, memory_bytes=limits.file_memory_mb * 2**20)
        self._ahead = AHEAD_PER_WORKER * workers

    def read(self, sources: Sequence[str], cache_dir: Path, hub_revision: str | None) -> Iterator[dict[str, str]]:
        """Every document, clean, distinct and counted."""
        if sum(is_hub_id(source) and not Path(source).exists() for source in sources) > 1 and hub_revision is not None:
            fix = "give one hub dataset per corpus; download the others and name their files"
            self.problems.add("several hub datasets, but one revision: a commit belongs to one dataset", sources, fix)
        with self._pool:
            waiting: deque[_File] = deque()
            for file in self._files(sources, cache_dir, hub_revision):
                if isinstance(file, _File):
                    waiting.append(file)
                else:
                    yield from self._emptied(waiting, 0)
                    yield from file
                yield from self._emptied(waiting, self._ahead)
            yield from self._emptied(waiting, 0)

    def _emptied(self, waiting: deque[_File], most: int) -> Iterator[dict[str, str]]:
        while len(waiting) > most:
            file = waiting.popleft()
            yield from self._read(file)
            self.look.done_file(file.path)

    def _files(
        self, sources: Sequence[str], cache_dir: Path, hub_revision: str | None
    ) -> Iterator[_File | Iterator[dict[str, str]]]:
        for source in sources:
            path = Path(source).expanduser()
            if path.is_dir() and source.strip():
                for file in self._files_below(path):
                    yield self._file(file, file.relative_to(path), inside_folder=True)
            elif path.is_file():
                yield self._file(path, Path(path.name), inside_folder=False)
            elif is_hub_id(source) and path.suffix.lower() not in DOCUMENT_SUFFIXES:
                self.tally.files += 1
                rows = iter_hub_rows(source, hub_revision, split=None, cache_dir=cache_dir, problems=self.problems)
                yield text_rows(rows, source, self.problems, self.tally, self.look)
            else:
                yield self._missing(source)

    def _missing(self, source: str) -> Iterator[dict[str, str]]:
        self.problems.add(f"{source!r} does not exist", fix=path_fix(source))
        yield from ()

    def _files_below(self, folder: Path) -> Iterator[Path]:
        def complain(error: OSError) -> None:
            what = f"{error.filename}: cannot be listed: {error.strerror}"
            if self.limits.on_unreadable == "stop":
                self.problems.add(what, fix="check its permissions")
            else:
                self.tally.skip(Path(error.filename), "cannot be listed", what)

        yield from files_below(folder, complain)

    def _file(self, path: Path, relative: Path, *, inside_folder: bool) -> _File:
        is_parsed = path.suffix.lower() in PARSED_SUFFIXES and _size(path) > 0
        reading = self._pool.submit(path) if is_parsed else None
        return _File(path, printable_path(relative), inside_folder, reading)

    def _not_read(self, file: _File, suffix: str) -> None:
        if file.inside_folder:
            self.tally.skip(file.path, f"suffix {suffix or '(none)'} not read")
        else:
            fix = f"convert it to one of {' '.join(DOCUMENT_SUFFIXES)}"
            self.problems.add(f"{printable_path(file.path)}: files of this kind are not read", suffix, fix)

    def _read(self, file: _File) -> Iterator[dict[str, str]]:
        path, shown, suffix = file.path, printable_path(file.path), file.path.suffix.lower()
        if suffix not in DOCUMENT_SUFFIXES:
            self._not_read(file, suffix)
            return
        self.tally.files += 1
        try:
            if _size(path) == 0:
                self.tally.dropped[EMPTY] += 1
            elif file.reading is None and suffix in TABLE_SUFFIXES:
                yield from self._table(file)
            else:
                extracted = self._pool.result(file.reading) if file.reading else read_file(path)
                self.tally.account(file.name, extracted)
                for part, text in extracted.documents:
                    document = self.tally.accept(f"{file.name}#{part}" if part else file.name, text)
                    if document:
                        self.look.saw(document["text"])
                        yield document
        except NoTextError as error:
            reason = f"{NO_TEXT}: {error}" if error.kind == NO_TEXT else str(error)
            self._unreadable(file, error.kind, f"{shown}{error.place}: {reason}", error.fix)
        except ImportError as error:
            fix = "install what the message names, or: pip install -r requirements.txt"
            self.problems.add(f"{shown}: the reader of {suffix} files cannot be imported", str(error), fix)
        except OSError as error:
            what = f"{shown}: cannot be read: {error.strerror or error}"
            self._unreadable(file, "cannot be read", what, "check the path and its permissions")

    def _unreadable(self, file: _File, kind: str, what: str, fix: str) -> None:
        if self._skips(file):
            self.tally.skip(file.path, kind, what)
        else:
            self.problems.add(what, fix=fix or "or take it out of the sources")

    def _skips(self, file: _File) -> bool:
        return self.limits.on_unreadable == "skip" or (self.limits.on_unreadable == "auto" and file.inside_folder)

    def _table(self, file: _File) -> Iterator[dict[str, str]]:
        skips = self._skips(file)
        problems, without_column = ProblemList() if skips else self.problems, self.tally.dropped[NO_COLUMN]
        yield from text_rows(iter_rows(file.path, problems), file.name, problems, self.tally, self.look)
        if skips and problems:
            # of rows without a text column or not in UTF-8 the first is complained of, and all are counted
            if malformed := len(problems) - (self.tally.dropped[NO_COLUMN] > without_column) - problems.has_bad_bytes:
                self.tally.dropped[BAD_ROW] += malformed
            for problem in problems.shown:
                self.tally.name(str(problem))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
