"""Every test file in a process of its own, as many at a time as there are cores, the longest first.

    python -m tests.run_all                      all of them
    python -m tests.run_all tests/test_html*.py  some

The same tests as `python -m unittest discover tests`. Each process is forked from a server that has imported torch,
transformers and PEFT once: a file would spend ten seconds of a core on that, and as many again for the scripts it runs.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import unittest
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from tests import PRELOADED

HERE = Path(__file__).resolve().parent


def main(names: list[str]) -> int:
    """Run the files, print what each said when it has ended; 0 when all passed."""
    waiting = [Path(name) for name in names] or in_order(sorted(HERE.glob("test_*.py")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    running: dict[Any, tuple[Path, Any, str, float]] = {}
    failed, began = [], time.monotonic()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            path = waiting.pop(0)
            handle, log = tempfile.mkstemp(prefix="adapter-tests-")
            os.close(handle)
            process = context.Process(target=run_file, args=(f"tests.{path.stem}", log))
            process.start()
            running[process.sentinel] = (path, process, log, time.monotonic())
        for sentinel in connection.wait(list(running)):
            path, process, log, started = running.pop(sentinel)
            process.join()
            said = Path(log).read_text(encoding="utf-8", errors="replace")
            os.unlink(log)
            print(f"{path.name} ({time.monotonic() - started:.0f} s)\n{said}", flush=True)
            if process.exitcode:
                failed.append(path.name)
    print(f"{time.monotonic() - began:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def in_order(paths: list[Path]) -> list[Path]:
    """The real model's first, then what runs whole scripts, then by size: a long one that starts last is waited for."""

    def rank(path: Path) -> tuple[bool, bool, int]:
        return "integration" not in path.name, "system" not in path.name, -path.stat().st_size

    return sorted(paths, key=rank)


def run_file(module: str, log: str) -> None:
    """In the forked process: the tests of one module, what they write in a file."""
    # Python 3.11 starts a second server in a child of the first (its own documentation says it would not)
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(handle, descriptor)
    os.chdir(HERE.parent)
    sys.argv = ["python -m unittest", module]
    tests = unittest.defaultTestLoader.loadTestsFromName(module)
    result = unittest.TextTestRunner(stream=sys.stderr).run(tests)
    sys.stderr.flush()
    sys.exit(0 if result.wasSuccessful() else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
