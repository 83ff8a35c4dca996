"""How often a test split has been read: each new comparison writes a line before it scores anything.

A test split that is read for many models, or again and again while settings change, is a dev split. The record is kept
beside the evaluations and survives their removal.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.artifacts import files

RECORD = ".test_reads.jsonl"


def digest(names: Sequence[str], texts: Sequence[str]) -> str:
    """Identifies a set of test items whatever their order."""
    return files.fingerprint(sorted(zip(names, texts, strict=True)))


def record(evaluations: Path, *, test: str, composed: str, run: str) -> dict[str, Any]:
    """Note that `run` reads the test split `test` for the model `composed`; a resumed run is noted once.

    Returns how many comparisons read this split (`reads`), for how many models, and how many read it for this one.
    """
    files.make_directory(evaluations)
    path = evaluations / RECORD
    lines = _lines(path)
    if not any(line["run"] == run for line in lines):
        entry = {
            "test": test,
            "composed": composed,
            "run": run,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        lines.append(entry)
    same = [line for line in lines if line["test"] == test]
    own = [line for line in same if line["composed"] == composed]
    return {
        "test": test,
        "reads": len(same),
        "models": len({line["composed"] for line in same}),
        "reads_of_this": len(own),
    }


def sentence(reads: dict[str, Any]) -> str:
    """What a reader should know about it; empty when the split was read once."""
    if reads["reads"] <= 1:
        return ""
    return (
        f"This test split was read {reads['reads']} times, {reads['reads_of_this']} of them for these adapters: "
        "what was chosen after seeing it is too good here."
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """A line that a crash cut short is no reading."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found
