"""Structured logging: readable on a terminal, JSON lines in the run directory, silent on ranks above 0.

`event("checkpoint", step=20)` is one line for a person and one JSON object for a program. Standard output is kept
for results (its last line is JSON), so all logging goes to standard error. What is printed passes through here: without
secrets (`utils/secrets.py`), and without what would command a terminal.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from utils import disk
from utils.secrets import redact

_LOGGER = logging.getLogger("adapters")
INFO, WARNING, DEBUG = logging.INFO, logging.WARNING, logging.DEBUG
_level = INFO
# control characters but tab and newline, line separators, marks that reorder text, halves of surrogate pairs
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def rank() -> int:
    """Global rank of this process, from the launcher's environment; 0 when launched plainly."""
    return int(os.environ.get("RANK", "0"))


def printable(text: str) -> str:
    """Text that cannot command a terminal: no escape sequence, no text that only looks like another."""
    return _COMMANDS.sub("\ufffd", text)


def json_line(value: Any) -> str:
    """One line of JSON without secrets; what would command a terminal is escaped, so nothing is lost."""
    text = redact(json.dumps(value, ensure_ascii=False, default=str))
    return _COMMANDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class _Cleaned:
    """A stream whose text is cleaned before it is written."""

    def __init__(self, stream: TextIO, clean: Callable[[str], str]):
        self._stream, self._clean = stream, clean

    def write(self, text: str) -> int:
        return self._stream.write(self._clean(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def clean_output() -> Iterator[None]:
    """Meanwhile nothing that is printed, also by a library, holds a secret; standard output commands no terminal."""
    before = sys.stdout, sys.stderr
    if rank() > 0:  # what a script prints is rank 0's
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    # progress bars on standard error move the cursor
    sys.stdout = _Cleaned(sys.stdout, lambda text: printable(redact(text)))  # type: ignore[assignment]
    sys.stderr = _Cleaned(sys.stderr, redact)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Terminal(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        mark = {"WARNING": " warning:", "ERROR": " error:"}.get(record.levelname, "")
        facts = " ".join(f"{key}={_short(value)}" for key, value in getattr(record, "facts", {}).items())
        return printable(redact(f"{clock}{mark} {record.getMessage()}{'  ' + facts if facts else ''}"))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        return json_line(line | getattr(record, "facts", {}))


class _RunLog(logging.Handler):
    """Whole lines at the end of a file; a disk that refuses one ends the run with the file's name, not with silence."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        disk.append_line(self.path, self.format(record))


def setup(level: int = logging.INFO) -> None:
    """Log to standard error on rank 0; call once, at the start of a script.

    WARNING leaves out what merely happens (a run's own log has it all the same), DEBUG lets transformers speak too.
    """
    global _level
    _level = level
    _LOGGER.handlers.clear()
    _LOGGER.propagate = False
    _LOGGER.setLevel(logging.INFO)
    if rank() > 0:
        _LOGGER.addHandler(logging.NullHandler())
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Terminal())
    handler.setLevel(level)
    _LOGGER.addHandler(handler)


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Meanwhile also append JSON lines to `path` (the run's `run.log`), on rank 0."""
    if rank() > 0:
        yield
        return
    handler = _RunLog(path)
    handler.setFormatter(_JsonLines())
    _LOGGER.addHandler(handler)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        handler.close()


def event(message: str, **facts: Any) -> None:
    """One thing that happened, with its numbers."""
    _LOGGER.info(message, extra={"facts": facts})


def warning(message: str, **facts: Any) -> None:
    """Something a person should look at; the run goes on."""
    _LOGGER.warning(message, extra={"facts": facts})


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


class quiet_transformers:
    """No loading bars and no advisory warnings from transformers while our own lines tell what happens."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._verbosity = logging.get_verbosity()
        if _level <= DEBUG:
            logging.set_verbosity_info()
            return
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._verbosity)
