"""The parent of a server: ends it, and all that it started, when the program that wanted it is gone or says so.

A program of its own, of the standard library alone: python server_guard.py PARENT COMMAND...

It leads a session, so that Ctrl-C on a terminal reaches the program and not the server. SIGTERM, or the death of
process PARENT, ends the whole process group: SIGTERM first, SIGKILL to what is left (the guard with it).
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
LOOK_SECONDS, PATIENCE_SECONDS = 0.1, 10.0


def end_with_parent() -> None:
    """Get SIGTERM when the parent ends; Linux only, elsewhere the look at the parent's number has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def guard(parent: int, words: list[str]) -> None:
    """Run the command until it ends, or until nobody wants it any more. Does not return: it kills its own group."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: signals.append(received))
    end_with_parent()
    server = subprocess.Popen(words, preexec_fn=end_with_parent)
    while server.poll() is None and not signals and os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    if server.returncode is not None:
        print(f"the server ended by itself with {server.returncode}", flush=True)
    os.killpg(0, signal.SIGTERM)
    end = time.monotonic() + PATIENCE_SECONDS
    while server.poll() is None and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    guard(int(sys.argv[1]), sys.argv[2:])
