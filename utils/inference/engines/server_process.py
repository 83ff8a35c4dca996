"""A server that a command starts for itself: its folder, its process group, and what killed commands left behind.

The folder `.engine-*` lies in --run.models_dir and is locked while the command lives; the server's environment names
it. So the next start knows which folders and which processes nobody needs any more, and touches no others.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from utils.artifacts import locks
from utils.exceptions import ArtefactError
from utils.inference.engines import server_guard
from utils.logger import redact

PREFIX = ".engine-"
LOG = "server.log"
# in the environment of everything that a server starts: its folder
OWNER = "ENGINE_OWNER"
TAIL_BYTES, TAIL_LINES = 8000, 12
LOOK_SECONDS = 0.2


@contextmanager
def folder(models_dir: Path) -> Iterator[Path]:
    """A locked folder for one server, gone afterwards; what killed commands left is ended and removed first."""
    end_leftovers(models_dir)
    folder = models_dir / f"{PREFIX}{secrets.token_hex(6)}@{socket.gethostname()}"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(locks.locked(folder, "the folder of an engine"))
        yield folder


def end_leftovers(models_dir: Path) -> None:
    """End servers whose command was killed, and remove their folders; those in use, and another host's, stay."""
    for left in models_dir.glob(f"{PREFIX}*@{socket.gethostname()}"):
        with suppress(ArtefactError), locks.locked(left, "the folder of an engine"):
            _end_owned(left)
            shutil.rmtree(left, ignore_errors=True)


class ServerProcess:
    """A running server: `address` is where it will answer."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], port: int, home: Path):
        """Start it; a command that cannot be started has ended by itself, and said why."""
        self.address, self.home = f"http://127.0.0.1:{port}", home
        guard = [sys.executable, "-S", "-E", server_guard.__file__, str(os.getpid()), *words]
        with (home / LOG).open("ab") as log:
            self._guard = subprocess.Popen(
                guard,
                env={**environment, OWNER: str(home.resolve())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self._guard.poll() is None

    def last_output(self) -> str:
        """The last lines that it wrote, without secrets."""
        text = (self.home / LOG).read_bytes()[-TAIL_BYTES:].decode("utf-8", errors="replace")
        return redact("\n".join([line for line in text.splitlines() if line.strip()][-TAIL_LINES:]))

    def stop(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError):
            self._guard.terminate()
        try:
            self._guard.wait(server_guard.PATIENCE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()
        _end_owned(self.home)  # what is in a group of its own, or has lost its guard


def free_port() -> int:
    """A port of 127.0.0.1 that nobody holds now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _owned(home: Path) -> list[psutil.Process]:
    """Living processes of this user whose environment names this folder."""
    processes, name = [], str(home.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            is_ours = process.pid != os.getpid() and process.environ().get(OWNER) == name
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def _end_owned(home: Path) -> None:
    """End what belongs to this folder, and what that starts meanwhile: SIGTERM, after a while SIGKILL."""
    end = time.monotonic() + server_guard.PATIENCE_SECONDS
    while owned := _owned(home):
        is_late = time.monotonic() > end
        for process in owned:
            with suppress(psutil.Error):
                process.kill() if is_late else process.terminate()
        psutil.wait_procs(owned, timeout=LOOK_SECONDS)
