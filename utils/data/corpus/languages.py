"""Which languages the documents are in, by py3langid (97 languages, numpy only, its model is in the package)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLED, CHARACTERS = 250, 1000
# shorter texts are not told apart
FEWEST_CHARACTERS = 40
UNKNOWN = "too short to tell"


def languages(documents: Dataset) -> dict[str, int]:
    """ISO 639-1 code -> number of documents, the most frequent first, of at most 250 spread over the corpus."""
    import py3langid

    step = max(1, -(-len(documents) // SAMPLED))
    counted: Counter[str] = Counter()
    for position in range(0, len(documents), step):
        text = documents[position]["text"][:CHARACTERS]
        counted[py3langid.classify(text)[0] if len(text.split()) and len(text) >= FEWEST_CHARACTERS else UNKNOWN] += 1
    return dict(counted.most_common())
