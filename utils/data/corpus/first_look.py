"""How far the reading of documents is, and from its first part how long all of it will take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from utils.progress import Progress

FIRST_FILES, FIRST_ROWS = 100, 1000
# of the first texts, kept to see how long they take to tokenise
SAMPLE_CHARACTERS = 1 << 18
MEGABYTE = 1e6


@dataclass(frozen=True)
class Look:
    """The first part of the sources: what it took to read, how much there is, and some of its texts."""

    seconds: float
    bytes_read: int
    bytes_all: int
    characters: int
    """Of the text that was read so far."""
    texts: list[str]


class LookAhead:
    """Progress of reading by the bytes of the files; after the first 100 files or 1,000 rows the first look is told."""

    def __init__(self, sources: Sequence[str], on_first_look: Callable[[Look], None] | None):
        self._sources, self._tell = sources, on_first_look
        self._files = self._rows = 0
        self._done = self._current = 0
        self._texts: list[str] = []
        self._sampled = self._characters = 0

    def __enter__(self) -> LookAhead:
        self._all = sum(_sizes(self._sources))
        self._began = time.monotonic()
        self._bar = Progress("reading documents", total=self._all / MEGABYTE, unit="MB")
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def saw(self, text: str, *, is_row: bool = False) -> None:
        """A document was read; rows count as part of a file that is not done yet."""
        self._characters += len(text)
        if self._tell and self._sampled < SAMPLE_CHARACTERS:
            self._texts.append(text)
            self._sampled += len(text)
        if is_row:
            self._rows += 1
            self._advance(len(text))
            self._look()

    def done_file(self, path: Path) -> None:
        """A file was read."""
        self._files += 1
        try:
            self._advance(path.stat().st_size - self._current)
        except OSError:
            self._advance(0)
        self._current = 0
        self._look()

    def _advance(self, size: int) -> None:
        self._current += size
        self._done += size
        self._bar.advance(size / MEGABYTE)

    def _look(self) -> None:
        if self._tell and (self._files >= FIRST_FILES or self._rows >= FIRST_ROWS):
            tell, self._tell = self._tell, None
            tell(Look(time.monotonic() - self._began, self._done, self._all, self._characters, self._texts))
            self._texts = []


def files_below(folder: Path, complain: Callable[[OSError], None]) -> Iterator[Path]:
    """The files of a folder, recursively, in sorted order, without hidden ones; links are followed, once."""
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=complain):
        # a link to a parent folder would be walked forever
        real = os.path.realpath(root)
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))
        visited.add(real)


def _sizes(sources: Sequence[str]) -> Iterator[int]:
    for source in sources:
        path = Path(source).expanduser()
        named = files_below(path, lambda error: None) if source.strip() and path.is_dir() else [path]
        for file in named:
            try:
                yield file.stat().st_size if file.is_file() else 0
            except OSError:
                yield 0
