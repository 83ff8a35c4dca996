"""Files read side by side in child processes, each under limits of time and memory: what a file does harms no other.

A child is a fresh interpreter with light imports, started when there is work and kept for the next file. One that does
not answer in time, or dies, is replaced; its file is an unreadable file like others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

from utils.data.extraction.extracted import Extracted
from utils.data.extraction.worker import CRASH, MEMORY, read_answer

SLOW = "takes too long"
# the clock's limit is only for what waits without computing
WALL_PER_CPU_SECOND = 6
ROOT = Path(__file__).resolve().parents[3]
LIBRARIES_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Reading:
    """A file that is to be read, is being read, or was: then `reply` is the worker's answer."""

    path: Path
    reply: dict[str, Any] | None = None


class _Child:
    """One worker process and the file that it reads."""

    def __init__(self, seconds: float, memory_bytes: int):
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "utils.data.extraction.worker", str(theirs.fileno()), str(seconds)]
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(memory_bytes)],
                cwd=ROOT,
                env=inherited | dict.fromkeys(LIBRARIES_THREADS, "1") | {"PYTHONPATH": str(ROOT)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C is for this process, which ends them
                start_new_session=True,
            )
        self.reading: Reading | None = None
        self.deadline = 0.0

    def end(self) -> int:
        """Kill it if it lives; its exit code."""
        self.connection.close()
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait()


class ExtractionPool:
    """`with ExtractionPool(2, seconds=60, memory_bytes=2**31) as pool: pool.result(pool.submit(path))`.

    `seconds` are of processor time, for one file, so that a busy machine does not decide what is read.
    """

    def __init__(self, workers: int, *, seconds: float, memory_bytes: int):
        self.workers, self.seconds, self.memory_bytes = max(1, workers), seconds, memory_bytes
        self._waiting: deque[Reading] = deque()
        self._children: list[_Child] = []

    def __enter__(self) -> ExtractionPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the children; what is not read yet stays unread."""
        while self._children:
            self._children.pop().end()
        self._waiting.clear()

    def submit(self, path: Path) -> Reading:
        """Have a file read as soon as a child is free."""
        reading = Reading(path.absolute())
        self._waiting.append(reading)
        self._assign()
        return reading

    def result(self, reading: Reading) -> Extracted:
        """What a submitted file gives. Raises NoTextError, ImportError or OSError as `read_file` does."""
        while reading.reply is None:
            self._assign()
            self._collect()
        return read_answer(reading.reply)

    def _assign(self) -> None:
        for child in self._children:
            self._give(child)
        while self._waiting and len(self._children) < self.workers:
            self._children.append(_Child(self.seconds, self.memory_bytes))
            self._give(self._children[-1])

    def _give(self, child: _Child) -> None:
        if child.reading is None and self._waiting:
            try:
                child.connection.send_bytes(os.fsencode(self._waiting[0].path))
            except OSError:
                return  # it has ended; `_collect` sees that
            child.reading = self._waiting.popleft()
            child.deadline = time.monotonic() + WALL_PER_CPU_SECOND * self.seconds

    def _collect(self) -> None:
        """Wait for one answer or one deadline."""
        busy = min((child.deadline for child in self._children if child.reading), default=time.monotonic() + 1)
        ready = wait([child.connection for child in self._children], timeout=max(0.0, busy - time.monotonic()))
        for child in list(self._children):
            if child.connection in ready:
                self._receive(child)
            elif child.reading and time.monotonic() >= child.deadline:
                self._replace(child, slow=True)

    def _receive(self, child: _Child) -> None:
        try:
            reply = json.loads(child.connection.recv_bytes())
        except (EOFError, OSError, ValueError):
            self._replace(child)
            return
        if child.reading:
            child.reading.reply = reply
        child.reading = None
        if reply.get("is_last"):
            self._replace(child)
        else:
            self._give(child)

    def _replace(self, child: _Child, *, slow: bool = False) -> None:
        """A child that ended, or has to: its file is given up."""
        self._children.remove(child)
        code = child.end()
        if child.reading is not None:
            child.reading.reply = _given_up(code, slow, self.seconds)


def _given_up(code: int, slow: bool, seconds: float) -> dict[str, Any]:
    if slow or code == -getattr(signal, "SIGXCPU", 0):
        reason = f"reading it takes more than {seconds:g} seconds"
        return {"kind": SLOW, "reason": reason, "fix": "raise --data.file_seconds, or take it out of the sources"}
    if code == -signal.SIGKILL:
        return {"kind": MEMORY, "reason": "its reader was killed, as a system does when memory runs out"}
    return {"kind": CRASH, "reason": f"its reader ended with code {code}"}
