"""Every test file in a process of its own, one more at a time than there are cores (some wait), the longest first.

    python -m tests.run_all                      all of them
    python -m tests.run_all tests/test_html*.py  some

The same tests as `python -m unittest discover tests`. Each process is forked from this one, which has imported
everything once: a file would spend ten seconds of a core on that, and as many again for the scripts it runs. What a
file used is told with its processes; the last lines say where the time went.
"""

from __future__ import annotations

import atexit
import importlib
import os
import socket
import sys
import tempfile
import time
import traceback
import unittest
from multiprocessing import connection, forkserver
from pathlib import Path

from tests import PRELOADED

HERE = Path(__file__).resolve().parent


def main(names: list[str]) -> int:
    """Run the files, print what each wrote when it has ended; 0 when all passed."""
    waiting = [Path(name) for name in names] or in_order(sorted(HERE.glob("test_*.py")))
    began = time.monotonic()
    # each interpreter that a test starts would compile a hundred modules again
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    importlib.import_module(PRELOADED)
    running: dict[int, tuple[Path, str, float]] = {}
    failed, seconds = [], {}
    while waiting or running:
        while waiting and len(running) <= (os.cpu_count() or 1):
            path = waiting.pop(0)
            handle, log = tempfile.mkstemp(prefix="adapter-tests-")
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                run_file(f"tests.{path.stem}", handle)
            os.close(handle)
            running[pid] = (path, log, time.monotonic())
        pid, status, used = os.wait4(-1, 0)
        path, log, started = running.pop(pid)
        said = Path(log).read_text(encoding="utf-8", errors="replace")
        os.unlink(log)
        seconds[path.name] = used.ru_utime + used.ru_stime
        took = f"{time.monotonic() - started:.0f} s, {seconds[path.name]:.0f} s of a core"
        print(f"{path.name} ({took})\n{said}", flush=True)
        if status:
            failed.append(path.name)
    longest = sorted(seconds, key=lambda name: -seconds[name])[:10]
    print("the longest, in seconds of a core:", ", ".join(f"{name} {seconds[name]:.0f}" for name in longest))
    print(
        f"{sum(seconds.values()):.0f} s of a core, {time.monotonic() - began:.0f} s"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


def in_order(paths: list[Path]) -> list[Path]:
    """The real model's first, then what runs whole scripts, then by size: a long one that starts last is waited for."""

    def rank(path: Path) -> tuple[bool, bool, int]:
        return "integration" not in path.name, "system" not in path.name, -path.stat().st_size

    return sorted(paths, key=rank)


def run_file(module: str, log: int) -> None:
    """In the forked process: the tests of one module, what they write in a file. It does not return."""
    code = 1
    try:
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.chdir(HERE.parent)
        sys.argv = ["python -m unittest", module]
        server, alive = fork_the_server()
        tests = unittest.defaultTestLoader.loadTestsFromName(module)
        code = 0 if unittest.TextTestRunner(stream=sys.stderr).run(tests).wasSuccessful() else 1
        atexit._run_exitfuncs()
        os.close(alive)
        os.waitpid(server, 0)  # what the scripts used counts for this file
    except Exception:  # noqa: BLE001 - shown in the file's log, and the next file is run
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork_the_server() -> tuple[int, int]:
    """What support.py forks scripts from, as a fork of this process, while it has no threads.

    Left to itself multiprocessing starts an interpreter, which imports everything again. Returns its process id, and
    the descriptor whose closing ends it.
    """
    server = forkserver._forkserver
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address := connection.arbitrary_address("AF_UNIX"))
        listener.listen()
        read, write = os.pipe()
        if not (pid := os.fork()):
            os.close(write)
            try:
                forkserver.main(listener.detach(), read, [])
            finally:
                os._exit(0)
    os.close(read)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, write, pid
    return pid, write


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
