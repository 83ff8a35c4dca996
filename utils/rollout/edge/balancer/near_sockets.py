"""Unix sockets by the folder they lie in: a path of any length, where the kernel takes 108 bytes and HAProxy 97.

HAProxy is started in its folder (`-C`) and has relative paths; we reach the same files through a descriptor of it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def connect(near: socket.socket, path: Path) -> None:
    """Raises OSError."""
    with _short(path) as short:
        near.connect(short)


def bind(near: socket.socket, path: Path) -> None:
    """Raises OSError."""
    with _short(path) as short:
        near.bind(short)


@contextmanager
def _short(path: Path) -> Iterator[str]:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
