"""What may be removed: runs that a person names, and what is left of runs that nobody goes on with.

Nothing is removed that another process is working on, and nothing without having been listed first.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils import disk
from utils.artifacts import files, locks, run_list
from utils.artifacts.run_list import Entry
from utils.exceptions import ArtefactError
from utils.logger import event

# beside a complete run: what a kill left, and what a longer run could go on from (`utils/training/checkpoints.py`)
CHECKPOINTS = {"checkpoints": "checkpoints of a complete run", ".last_state": "the optimiser's state of a complete run"}


@dataclass
class Removal:
    """Directories that go, with what is lost by it; `warnings` say what others lose."""

    what: str
    path: Path
    size_bytes: int
    warnings: list[str] = field(default_factory=list)

    def line(self) -> str:
        return f"{self.path}  {self.what}, {self.size_bytes / 1e6:,.1f} MB"

    def to_json(self) -> dict[str, Any]:
        values = {"path": str(self.path), "what": self.what, "size_bytes": self.size_bytes}
        return {**values, "warnings": self.warnings}


def of_runs(named: Sequence[Entry]) -> list[Removal]:
    """These runs, whole. What was made from one and stays can no longer be verified: that is a warning."""
    going = {entry.directory for entry in named}
    removals = []
    for entry in named:
        left = [child for child in run_list.descendants(entry) if child.directory not in going]
        warnings = [
            f"{child.name} was made from {entry.name}: verify will no longer trust it, and it cannot be made again"
            for child in left
        ]
        removals.append(Removal(f"{entry.state} {entry.stage} run", entry.directory, entry.size_bytes, warnings))
    return removals


def of_leftovers(listed: Sequence[Entry], *, older_than_days: float) -> list[Removal]:
    """Unfinished runs, and checkpoints beside what is complete, that nothing has touched for so many days.

    A complete run, and with it every parent of one, stays; so does what cannot be read, which a person may restore.
    """
    before = time.time() - older_than_days * 86_400
    removals = []
    for entry in listed:
        if entry.state == "unfinished" and entry.changed_at <= before:
            removals.append(Removal(f"unfinished {entry.stage} run", entry.directory, entry.size_bytes))
            continue
        for name, what in CHECKPOINTS.items():
            beside = entry.directory / name
            if entry.manifest and beside.is_dir() and _touched(beside) <= before:
                removals.append(Removal(what, beside, run_list.size(beside)))
    return removals


def remove(removals: Sequence[Removal]) -> None:
    """Remove them. Raises ArtefactError, before anything is gone, when another process works on one."""
    busy = []
    for removal in removals:
        try:
            with locks.locked(_run_of(removal.path), "the run"):
                pass
        except ArtefactError as error:
            busy += [replace(problem, fix="wait for it, or stop that process") for problem in error.problems]
    if busy:
        raise ArtefactError(busy)
    for removal in removals:
        run = _run_of(removal.path)
        with locks.locked(run, "the run"), disk.errors(removal.path):
            # without its manifest it is no run any more, so one that a kill leaves half is not taken for a whole one
            if removal.path == run:
                (run / files.MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(removal.path)
        event("removed", path=removal.path)


def _run_of(path: Path) -> Path:
    return path.parent if path.name in CHECKPOINTS else path


def _touched(directory: Path) -> float:
    return max(path.lstat().st_mtime for path in [directory, *directory.rglob("*")])
