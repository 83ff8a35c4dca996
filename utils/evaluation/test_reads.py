"""How often a test split has been read: each new comparison writes a line before it scores anything.

A test split that is read for many models, or again and again while settings change, is a dev split. The record is kept
beside the evaluations and survives their removal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.artifacts import files, resumable

RECORD = ".test_reads.jsonl"
# the metric of lines that name none: there was no other
FIRST = "answer_nll"
# where no question was asked
NONE = {"test": "", "reads": 0, "models": 0, "reads_of_this": 0, "doubtful": 0}


def digest(names: Sequence[str], texts: Sequence[str]) -> str:
    """Identifies a set of test items whatever their order."""
    return files.fingerprint(sorted(zip(names, texts, strict=True)))


def record(evaluations: Path, *, test: str, composed: str, run: str, primary: str = FIRST) -> dict[str, Any]:
    """Note that `run` reads the test split `test` for the model `composed` by a metric; a resumed run is noted once.

    Returns how many comparisons read this split (`reads`), for how many models, how many read it for this one, and by
    which metrics these did.
    """
    files.make_directory(evaluations)
    path = evaluations / RECORD
    lines, doubtful = _lines(path)
    if not any(line["run"] == run for line in lines):
        entry = {
            "test": test,
            "composed": composed,
            "run": run,
            "primary": primary,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        resumable.append(path, entry, RECORD)
        lines.append(entry)
    same = [line for line in lines if line["test"] == test]
    own = [line for line in same if line["composed"] == composed]
    return {
        "test": test,
        "reads": len(same),
        "models": len({line["composed"] for line in same}),
        "reads_of_this": len(own),
        "metrics": sorted({line["primary"] or FIRST for line in own}),
        "doubtful": doubtful,
    }


def sentence(reads: dict[str, Any]) -> str:
    """What a reader should know about it; empty when the split was read once, by a record nobody edited."""
    sentences = []
    if reads["reads"] > 1:
        sentences.append(
            f"This test split was read {reads['reads']} times, {reads['reads_of_this']} of them for these adapters: "
            "what was chosen after seeing it is too good here."
        )
    if len(reads.get("metrics", [])) > 1:
        sentences.append(
            f"These adapters were judged here by {', '.join(reads['metrics'])}: with each further metric the chance "
            "grows that one of them says *helps* by luck; the one to decide on is named before the split is read."
        )
    if reads["doubtful"]:
        sentences.append(
            f"{reads['doubtful']} lines of {RECORD}, which counts how often test splits are read, were edited or "
            "written by an earlier version: this split may have been read more often."
        )
    return " ".join(sentences)


def _lines(path: Path) -> tuple[list[dict[str, str]], int]:
    """The readings, and how many lines are not as this version wrote them: what those say is counted all the same."""
    readings, doubtful = [], 0
    for entry, is_as_written in resumable.lines(path, RECORD):
        doubtful += not is_as_written
        readings.append({key: str(entry.get(key, "")) for key in ("test", "composed", "run", "primary")})
    return readings, doubtful
