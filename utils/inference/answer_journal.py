"""Answers on disk as they are made, a line each: what an interrupted command has is not asked again."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.artifacts import resumable
from utils.models.parallel import ranks


@dataclass(frozen=True)
class AnswerJournal:
    """`of` is what the answers belong to: lines of anything else, or changed ones, are none.

    `holds` names what a line has of an answer: its token ids from a server, the whole answer from this process. Ranks
    that answer beside each other write a file each.
    """

    path: Path
    of: str
    holds: str = "ids"

    def known(self) -> dict[str, Any]:
        """Key -> what was kept of the answer, of all ranks."""
        return {
            entry["key"]: entry[self.holds]
            for part in self._parts()
            for entry, is_as_written in resumable.lines(part, self.of)
            if is_as_written and isinstance(entry.get(self.holds), (list, dict))
        }

    def add(self, key: str, kept: Any) -> None:
        """One more answer of this rank."""
        own = self.path.with_name(f"{self.path.name}.{ranks.index()}") if ranks.index() else self.path
        resumable.append(own, {"key": key, self.holds: kept}, self.of)

    def discard(self) -> None:
        """Remove the files of all ranks: the answers stand where they belong."""
        for part in self._parts():
            part.unlink(missing_ok=True)

    def _parts(self) -> Iterator[Path]:
        yield self.path
        others = self.path.parent.glob(f"{glob.escape(self.path.name)}.*")
        yield from sorted(other for other in others if other.suffix[1:].isdigit())
