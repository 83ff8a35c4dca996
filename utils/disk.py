"""What can go wrong on a disk, told by path and bytes, whichever library noticed; and space asked for beforehand."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.exceptions import ArtefactError, PipelineError, Problem, is_out_of_memory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def errors(target: Path) -> Iterator[None]:
    """What the disk refuses while `target` is written becomes an ArtefactError that names it.

    safetensors (a SafetensorError) and datasets (a DatasetGenerationError, or an OSError without a number) do not
    raise what the system told them; their full disk is recognised too.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or (cause := _of_the_system(error)) is None:
            raise
        raise error_for(target, cause) from error


def error_for(path: Path, error: OSError) -> ArtefactError:
    """The ArtefactError of one refusal: path, reason, bytes that are free, what to do."""
    reason = error.strerror or str(error)
    if error.filename and not Path(os.fsdecode(error.filename)).is_relative_to(path.parent):
        reason += f": {os.fsdecode(error.filename)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += f" ({free_bytes(path):,} bytes are free there)"
        fix = f"free space on the disk that holds {path.parent}, then run the same command again"
    elif error.errno == errno.EFBIG:
        fix = "raise the limit on file sizes (ulimit -f), then run the same command again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "choose a writable place with --run.data_dir / --run.models_dir, or change its permissions"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        fix = "a file stands where a directory is needed: remove it or choose another path"
    elif error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
        fix = "this file system has no locks: choose another with --run.data_dir / --run.models_dir"
    else:
        fix = "see the reason above"
    return ArtefactError(Problem(f"cannot write {path}: {reason}", fix=fix))


def append_line(path: Path, line: str) -> None:
    """Add a line whole or not at all: what a full disk took of it is taken back, what a dead machine left is ended."""
    with errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            is_ended = not before or os.pread(descriptor, 1, before - 1) == b"\n"
            data = (b"" if is_ended else b"\n") + line.encode() + b"\n"
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def make_directory(path: Path) -> None:
    """mkdir -p whose failure names the path and the reason."""
    with errors(path):
        path.mkdir(parents=True, exist_ok=True)


def require(directory: Path, needed: int, what: str) -> None:
    """Raises ArtefactError when `what` needs more bytes than are free under `directory`; called before writing."""
    free = free_bytes(directory)
    if free < needed:
        raise ArtefactError(
            Problem(
                f"{what} needs {needed:,} more bytes under {directory}, {free:,} are free",
                fix="free some space, then run the same command again; or choose another disk",
            )
        )


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the disk of `path`, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _of_the_system(error: BaseException) -> OSError | None:
    """The system's refusal in an error or in what it was raised from."""
    if isinstance(error, OSError) and error.errno:
        return error
    if isinstance(error, OSError) and "disk space" in str(error):  # datasets, without a number
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if (number := re.search(r"\(os error (\d+)\)", str(error))) and "Safetensor" in type(error).__name__:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    cause = _of_the_system(error.__cause__) if error.__cause__ else None
    # only a full disk is believed at second hand: what else a library met it may have been able to explain better
    return cause if isinstance(error, OSError) or (cause and cause.errno in FULL) else None
