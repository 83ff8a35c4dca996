"""What an interrupted run leaves for the next call: results that are believed only as they were written.

A cell, a suite or a line of a journal is not covered by a manifest until the run is complete. Each holds a seal over
itself and over what it belongs to (the run and the name of the result), so one that was edited, damaged or moved here
from another run is measured again. The seal is no secret: it shows accidents and edits by hand, as that of a manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils import disk
from utils.artifacts import files, manifests
from utils.artifacts.runs import IDENTITY
from utils.exceptions import ArtefactError
from utils.logger import warning


def owner(directory: Path) -> str:
    """What results in a begun run's directory belong to: the fingerprint of the identity that it recorded."""
    recorded = directory / IDENTITY
    return files.fingerprint(files.read_json(recorded)) if recorded.exists() else ""


def result(path: Path, of: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in `path`, measured and written when it is not there, or is not as it was written for `of`."""
    if (value := read(path, of)) is not None:
        return value
    return write(path, measure(), of)


def write(path: Path, value: dict[str, Any], of: str) -> dict[str, Any]:
    """Write a result; returns it as it will be read."""
    files.write_json(path, _sealed(value, f"{of}/{path.name}"))
    stored = files.read_object(path)
    del stored[manifests.SEAL]
    return stored


def read(path: Path, of: str) -> dict[str, Any] | None:
    """The result in `path`, or None when it is not there, or is not as it was written for `of` (which is said)."""
    if not path.exists():
        return None
    try:
        value = files.read_object(path)
    except ArtefactError as error:
        warning("what an earlier call left is not read: it is made again", reason=error.problems[0].what)
        return None
    seal = value.pop(manifests.SEAL, None)
    if seal != _seal(value, f"{of}/{path.name}"):
        warning("what an earlier call left is not as it was written: it is made again", path=path)
        return None
    return value


def append(path: Path, entry: dict[str, Any], of: str) -> None:
    """Append a line to a journal, whole or not at all."""
    disk.append_line(path, json.dumps(_sealed(entry, of)))


def lines(path: Path, of: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each line of a journal that is an object, and whether it is as it was written; what a kill cut short is none.

    Raises ArtefactError for a journal that is there and cannot be read.
    """
    with disk.errors(path):
        content = path.read_bytes() if path.exists() else b""
    for text in content.split(b"\n"):
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            seal = entry.pop(manifests.SEAL, None)
            yield entry, seal == _seal(entry, of)


def _sealed(value: dict[str, Any], of: str) -> dict[str, Any]:
    return {**value, manifests.SEAL: _seal(value, of)}


def _seal(value: dict[str, Any], of: str) -> str:
    return manifests.seal({**value, "of": of}, files.fingerprint)
