"""What prepared data will not be enough for, said before hours of training: pure counts in, sentences out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from config import BUILT_IN_TASKS, DataSection

# documents that an interval over documents needs (`evaluation.intervals.MIN_CLUSTERS`); below how many none is held out
INTERVAL_DOCUMENTS, SHARED_DOCUMENTS = 6, 10


def held_out(data: DataSection, documents: Mapping[str, int]) -> list[str]:
    """Of the documents: how many each part (`corpus`, `heldout_documents` ...) has."""
    if data.corpus[0] in BUILT_IN_TASKS:
        return []
    held, whole = documents.get("heldout_documents", 0), sum(documents.values())
    if held >= INTERVAL_DOCUMENTS:
        return []
    what = f"{held} held-out document{'s' * (held != 1)}: with fewer than {INTERVAL_DOCUMENTS} it cannot be tested "
    claim = "the domain adapter helps (D1)" if data.task == "none" else "composed keeps the domain (H1)"
    what += f"whether {claim}, and the verdict stays undecided; "
    if data.corpus_heldout:
        return [f"{what}give more of them with --data.corpus_heldout (half of them choose, half report)"]
    if whole < SHARED_DOCUMENTS:
        ignored = (
            f"--data.heldout_share {data.heldout_share:g} is ignored below {SHARED_DOCUMENTS} documents, there are "
        )
        return [f"{what}{ignored}{whole}: divide them into more files, or give others with --data.corpus_heldout PATH"]
    share = math.ceil(100 * 2 * INTERVAL_DOCUMENTS / whole) / 100
    if share <= 0.5:
        return [
            f"{what}--data.heldout_share {share:g} holds out enough of {whole} documents, or --data.corpus_heldout PATH"
        ]
    return [
        f"{what}{whole} documents are few: divide them into more files, or give others with --data.corpus_heldout PATH"
    ]


def labelled(examples: Mapping[str, Any]) -> list[str]:
    """Of the labelled pairs: `examples` has the counts of each split."""
    test = examples.get("test", {})
    about = test.get("documents", 0)
    if not test or about >= INTERVAL_DOCUMENTS:
        return []
    whole = sum(examples.get(split, {}).get("documents", 0) for split in ("train", "dev", "test"))
    # a hash decides, so twice as many are meant
    share = math.ceil(100 * 2 * INTERVAL_DOCUMENTS / whole) / 100 if whole else 1.0
    larger = f"take --data.test_share {share:g}, " if share <= 0.6 else ""
    return [
        f"the test questions are about {about} of {whole} document{'s' * (whole != 1)}: with fewer than "
        f"{INTERVAL_DOCUMENTS} no claim about answers has an interval; name what divides the pairs with "
        f"--data.columns document=COLUMN, {larger}or give --data.task_test FILE"
    ]
