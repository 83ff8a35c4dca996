"""Answers on disk as they are made, a line each: what an interrupted command has is not asked again."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.artifacts import files, resumable
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


def belonging(base: str, adapters: Sequence[str], recipe: str) -> str:
    """What answers belong to: a base model and adapters by their digests, and how those are composed."""
    return files.fingerprint([base, list(adapters), recipe])


def beside(output_file: str, belongs_to: str = "", holds: str = "ids") -> AnswerJournal | None:
    """Where the answers to a file that are there already stand while the others are asked for; None without a file."""
    path = Path(output_file)
    return AnswerJournal(path.with_name(f".{path.name}.partial.jsonl"), belongs_to, holds) if output_file else None
