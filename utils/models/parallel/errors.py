"""An error of one rank, told to the others through the store, and whether the others are still alive."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from utils import exceptions
from utils.exceptions import Interrupted, PipelineError, Problem, explained
from utils.logger import printable
from utils.signals import Terminated

if TYPE_CHECKING:
    from torch.distributed import Store

ERROR, REPORTED = "error", "said"
BEAT_SECONDS = 1.0
# a rank that gave no sign of life for so long is lost: its machine has ended, or it hangs; the end of a process of this
# machine is seen at the next look
LOST_SECONDS = 90.0
# how long a rank may go on with what it does after another one failed; in a collective it would wait for ever
GRACE_SECONDS = 20.0
ErrorRecord = dict[str, Any]


class Elsewhere(PipelineError):
    """This rank ends because of an error that rank 0 tells."""

    def __init__(self, record: ErrorRecord):
        super().__init__([Problem(*problem) for problem in record["problems"]])
        self.exit_code = record["exit_code"]


def post(store: Store, rank: int, error: BaseException) -> ErrorRecord | None:
    """Tell the others what this rank ends with; returns what was told first. None when they cannot be reached."""
    text = json.dumps(_described(rank, error))
    try:
        return dict(json.loads(store.compare_set(ERROR, "", text)))
    except RuntimeError:  # the rank that holds the store is gone
        return None


def error_of(record: ErrorRecord) -> PipelineError:
    """The error of another rank as an exception of the same kind."""
    problems = [Problem(*problem) for problem in record["problems"]]
    if record["rank"]:
        where = f"rank {record['rank']} on {record['host']}"
        problems[0] = Problem(f"{where}: {problems[0].what}", fix=problems[0].fix)
    error: PipelineError = getattr(exceptions, record["kind"], PipelineError)(problems)
    error.exit_code = record["exit_code"]
    return error


class Watch(threading.Thread):
    """Gives this rank's signs of life and looks for those, and the errors, of the others."""

    def __init__(self, store: Store, rank: int, size: int):
        super().__init__(name="ranks", daemon=True)
        self.beat_seconds = BEAT_SECONDS
        self.error: ErrorRecord | None = None
        self._store, self._rank, self._size = store, rank, size
        self._stopped = threading.Event()
        self._failed = False
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._neighbours: dict[int, psutil.Process] = {}
        store.set(f"process/{rank}", json.dumps([_HOST, os.getpid()]))

    def raise_error(self) -> None:
        """Raise the error that was told, if there is one."""
        if self.error is None and self._store.check([ERROR]):
            self.error = json.loads(self._store.get(ERROR))
        if self.error is not None:
            raise error_of(self.error)

    def stop(self, *, failed: bool = False) -> None:
        """Look no more. A rank that `failed` goes on giving signs of life until its process ends."""
        self._failed = failed
        if not failed:
            self._stopped.set()

    def run(self) -> None:
        beat, heard_at = 0, 0.0
        while not self._stopped.wait(self.beat_seconds):
            beat += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beat))
                if self._failed:
                    continue
                if self.error is None and self._store.check([ERROR]):
                    self.error = json.loads(self._store.get(ERROR))
                self._look_at_others()
            except RuntimeError:  # the store is gone; the connection to it tells the main thread too
                if self._failed:
                    return
                self.error = self.error or _described(self._rank, _lost("the first rank cannot be reached"))
            if self.error is not None:
                heard_at = heard_at or time.monotonic()
                if time.monotonic() - heard_at > GRACE_SECONDS:
                    self._end(self.error)

    def _look_at_others(self) -> None:
        now = time.monotonic()
        for rank in range(self._size):
            key = f"beat/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            known, since = self._beats.get(rank, (None, now))
            if beat != known:
                since = now
            self._beats[rank] = beat, since
            if rank == self._rank or self.error is not None:
                continue
            if self._has_ended(rank):
                self.error = post(self._store, self._rank, _lost(f"rank {rank}"))
            elif now - since > LOST_SECONDS:
                self.error = post(self._store, self._rank, _lost(f"rank {rank} gives no sign of life"))

    def is_without_first(self) -> bool:
        """Whether rank 0, which would tell a person, has ended or cannot be reached."""
        try:
            return self._has_ended(0)
        except RuntimeError:  # it held the store
            return True

    def _has_ended(self, rank: int) -> bool:
        """Whether a rank of this machine, which was seen here before, is no more; elsewhere this is not known."""
        if rank not in self._neighbours and self._store.check([f"process/{rank}"]):
            host, process = json.loads(self._store.get(f"process/{rank}"))
            with suppress(psutil.Error):
                if host == _HOST:
                    self._neighbours[rank] = psutil.Process(process)
        neighbour = self._neighbours.get(rank)
        with suppress(psutil.Error):
            return neighbour is not None and (not neighbour.is_running() or neighbour.status() == psutil.STATUS_ZOMBIE)
        return True

    def _end(self, record: ErrorRecord) -> None:
        """The main thread is in a collective, or in a computation of minutes, that nobody waits for any more."""
        if self._rank == 0:
            print(printable(str(error_of(record))), file=sys.stderr, flush=True)
            with suppress(RuntimeError):
                self._store.set(REPORTED, "said")
            time.sleep(2 * self.beat_seconds)  # for those who wait for it: this may be the rank that holds the store
        os._exit(int(record["exit_code"]))


def _described(rank: int, error: BaseException) -> ErrorRecord:
    if isinstance(error, Terminated):
        error = Interrupted(Problem("stopped by SIGTERM", fix="run the same command again"))
    elif isinstance(error, KeyboardInterrupt):
        error = PipelineError(Problem("interrupted"))
        error.exit_code = 130
    elif not isinstance(error, PipelineError):
        lines = "".join(traceback.format_exception(error))
        error = (explained(error, rank) if isinstance(error, Exception) else None) or PipelineError(Problem(lines))
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
        "problems": [
            [p.what if p.value is None else f"{p.what} (got {p.value!r})", None, p.fix] for p in error.problems
        ],
    }


def _lost(what: str) -> Interrupted:
    return Interrupted(
        Problem(f"another process of this run ended or cannot be reached: {what}", fix="run the same command again")
    )


def _boot() -> str:
    """This machine, as long as it runs: containers may share a name."""
    path = Path("/proc/sys/kernel/random/boot_id")
    space = os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()} {path.read_text().strip() if path.exists() else ''} {space}"


_HOST = _boot()
