"""SIGTERM and SIGINT: a clean end everywhere, after a checkpoint where there is one.

A script without checkpoints unwinds (`Terminated`), so what it was writing is taken away. The training loop finishes
its step, writes a checkpoint and ends (`stop_requested`). Handlers do no more than that: a handler that logs would
write into the middle of the line that it interrupted.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from utils.logger import rank

_PR_SET_PDEATHSIG = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Not an Exception: no library may take it for an error of its own and go on."""


@contextmanager
def terminable() -> Iterator[None]:
    """Meanwhile SIGTERM raises Terminated, once: a second one must not break off the tidying up."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    previous = signal.signal(signal.SIGTERM, handle)
    _follow_launcher()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT came meanwhile; a second SIGINT raises KeyboardInterrupt at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        again = "; press again to stop at once" if number == signal.SIGINT else ""
        if rank() == 0:
            with suppress(OSError):
                os.write(2, f"stopping after this step{again}\n".encode())

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _follow_launcher() -> None:
    """Get SIGTERM when the launcher ends: `accelerate launch` passes no signal on, and its orphan would train on.

    Linux only. Not for a script that a person started, which may outlive its shell.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
