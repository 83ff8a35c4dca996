"""A domain that needs no files, as `--data.corpus` and `--data.task` name it instead of a path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BuiltIn:
    """Documents, held-out documents, labelled pairs in the common form by split, and what each split is about."""

    documents: list[dict[str, str]]
    heldout: list[dict[str, str]]
    examples: dict[str, list[dict[str, Any]]]
    groups: dict[str, list[str]]
    dropped: dict[str, int]
