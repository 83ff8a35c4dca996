"""One process at a time on a directory, and the tidying up after those that were killed.

The lock is the kernel's (flock on `.lock`), so it is free as soon as its holder is dead, and needs no judging of clocks
or process numbers; the text in the file is only what a person who is refused gets to read.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from utils import disk
from utils.exceptions import ArtefactError, Problem
from utils.logger import event, redact

LOCK = ".lock"
POLL_SECONDS = 0.5
_SMALL_FILE = re.compile(r"\..+\.tmp-(\d+)(?:@(.+))?")


@contextmanager
def locked(directory: Path, what: str, *, waits: bool = False) -> Iterator[None]:
    """Hold `directory` for this process. The kernel drops the lock when we die.

    A second holder is refused, or `waits` for what two commands need and either may make.
    """
    disk.make_directory(directory)
    path = directory / LOCK
    with disk.errors(path):
        handle = _lock(path)
        if handle is None and waits:
            event(f"waiting for {what}, which another process makes", path=directory, by=_holder(path))
        while handle is None and waits:
            time.sleep(POLL_SECONDS)
            handle = _lock(path)
    if handle is None:
        raise ArtefactError(
            Problem(
                f"{what} {directory} is in use by {_holder(path)}",
                fix="wait for it, or give this run another --run.name",
            )
        )
    with handle:
        with disk.errors(path):
            handle.truncate(0)
            handle.write(_ourselves())
            handle.flush()
        yield


@contextmanager
def scratch(what: str) -> Iterator[Path]:
    """A folder under TMPDIR for what is thrown away afterwards; what killed processes left of it is removed first."""
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f".{what}-*.tmp"):
        # everybody may write there, and what another user left is theirs
        with suppress(OSError):
            if not left.is_symlink() and left.stat().st_uid == os.geteuid():
                remove_if_free(left)
    with tempfile.TemporaryDirectory(prefix=f".{what}-", suffix=".tmp") as name, locked(Path(name), "the folder"):
        yield Path(name)


def small_file(path: Path, shown: str = "") -> Path:
    """Where this process writes what is renamed to `path`: hidden, and its own on every host that shares the folder."""
    return path.with_name(f".{shown or path.name}.tmp-{os.getpid()}@{socket.gethostname()}")


def sweep(directory: Path, *, held: bool = False) -> None:
    """Remove what killed processes left: temporary directories nobody holds, and small files of dead processes.

    With `held` the caller has the lock of `directory`, so every small file below it is a dead process's. What is in
    use, what can be gone on from (`.NAME.partial-*`) and what is not ours stays, and so does what another host's
    process wrote: nobody here can tell whether it lives.
    """
    for path in directory.glob(".*.tmp"):
        remove_if_free(path)
    for path in directory.rglob(".*.tmp-*") if held else directory.glob(".*.tmp-*"):
        matched = _SMALL_FILE.fullmatch(path.name)
        if not matched or not path.is_file():
            continue
        if held or (matched[2] in (None, socket.gethostname()) and not _is_alive(int(matched[1]))):
            path.unlink(missing_ok=True)


def remove_if_free(temporary: Path) -> None:
    """Remove a temporary directory of ours (it has a lock file) that no process holds."""
    if not (temporary / LOCK).is_file():
        return
    with disk.errors(temporary):
        handle = _lock(temporary / LOCK)
    if handle is not None:
        with handle:
            shutil.rmtree(temporary, ignore_errors=True)
        event("removed what a killed process left", path=temporary)


def _lock(path: Path) -> TextIO | None:
    """The lock file, locked; None when another process has it."""
    while True:
        handle = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a holder that ended meanwhile may have taken the file away: a lock on it would be a lock on nothing
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                    return handle
            handle.close()
        except BlockingIOError:
            handle.close()
            return None
        except BaseException:
            handle.close()
            raise


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8").strip() or "another process"
    return "another process"


def _ourselves() -> str:
    """What a process that is refused is told about this one."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}: {redact(shlex.join(sys.argv))[:300]}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
