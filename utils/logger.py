"""Structured logging: readable on a terminal, JSON lines in the run directory, silent on ranks above 0.

`event("checkpoint", step=20)` is one line for a person and one JSON object for a program. Standard output is kept
for results (its last line is JSON), so all logging goes to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils import disk

_LOGGER = logging.getLogger("adapters")
_SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}")


def rank() -> int:
    """Global rank of this process, from the launcher's environment; 0 when launched plainly."""
    return int(os.environ.get("RANK", "0"))


def redact(text: str) -> str:
    """Access tokens never reach a log, a manifest or an exception."""
    return _SECRET.sub("<token>", text)


class _Terminal(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        mark = {"WARNING": " warning:", "ERROR": " error:"}.get(record.levelname, "")
        facts = " ".join(f"{key}={_short(value)}" for key, value in getattr(record, "facts", {}).items())
        return redact(f"{clock}{mark} {record.getMessage()}{'  ' + facts if facts else ''}")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        return redact(json.dumps(line | getattr(record, "facts", {}), ensure_ascii=False, default=str))


class _RunLog(logging.Handler):
    """Whole lines at the end of a file; a disk that refuses one ends the run with the file's name, not with silence."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        disk.append_line(self.path, self.format(record))


def setup() -> None:
    """Log to standard error on rank 0; call once, at the start of a script."""
    _LOGGER.handlers.clear()
    _LOGGER.propagate = False
    _LOGGER.setLevel(logging.INFO)
    if rank() > 0:
        _LOGGER.addHandler(logging.NullHandler())
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Terminal())
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
