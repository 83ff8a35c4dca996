"""How much of the data each point of a learning curve sees."""

from __future__ import annotations

from collections.abc import Sequence

PAIRS, DOCUMENTS = "pairs", "documents"
# shares of the data; the largest is what there is
SHARES = {PAIRS: (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0), DOCUMENTS: (1 / 4, 1 / 2, 1.0)}
# fewer than these at the smallest size make no optimiser step worth the name
FEWEST = {PAIRS: 4, DOCUMENTS: 2}


def part_counts(kind: str, sizes: Sequence[int]) -> list[int]:
    """How many pairs, or documents in their order, each part but the whole has.

    `sizes` are those of single ones: 1 of a pair, a document's tokens. Parts reach their share of the sum.
    """
    whole, counts = sum(sizes), []
    for share in SHARES[kind][:-1]:
        count, reached = 0, 0
        while reached < share * whole and count < len(sizes):
            reached += sizes[count]
            count += 1
        counts.append(count)
    return counts


def too_few(kind: str, counts: Sequence[int], there: int) -> str:
    """Why there is no learning curve of this kind; empty when the parts are large enough and differ."""
    if counts[0] >= FEWEST[kind] and len({*counts, there}) > len(counts):
        return ""
    return f"{there} {kind} are too few for {len(SHARES[kind])} sizes of them"
