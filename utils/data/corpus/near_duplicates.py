"""Documents that are hardly different from each other, found among all documents of a corpus at once.

Two documents are near duplicates when their sets of character 5-grams have a Jaccard index of at least 0.8 (Lee et al.
2022, arXiv:2107.06499). One-permutation MinHash (Li et al. 2012, arXiv:1208.1259) preselects: 128 bins, 25 bands of 5,
which misses a pair exactly at 0.8 once in some thousand. Every pair is then compared 5-gram by 5-gram. What is kept in
memory is 12 bytes of each document; the sketches lie in a file under `cache`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.data.ngram_overlap import BANDS, NEAR_JACCARD, ROWS, SHINGLE_CHARACTERS
from utils.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset

BINS = 128
# of a long document its beginning is compared
COMPARED_CHARACTERS = 1 << 20
DOCUMENTS_PER_BATCH = 200
_MULTIPLIER, _MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD)
_BIN_STARTS = (np.arange(BINS, dtype=np.uint64) << np.uint64(25)).astype(np.uint32)


def near_duplicate_clusters(parts: Sequence[Dataset], cache: Path) -> list[list[int]]:
    """Documents that are near duplicates of each other, directly or by way of others: their positions in `parts`, one
    part after the other, each cluster in order and of two documents at least. `cache` is a folder for scratch files.
    """
    total = sum(map(len, parts))
    if total < 2:
        return []
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / "sketches.bin"
    bands = np.memmap(path, dtype=np.uint32, mode="w+", shape=(BANDS, total))
    try:
        sizes = _fill(bands, parts)
        clusters = _Clusters(parts, sizes)
        for band in range(BANDS):
            clusters.join_equal(np.asarray(bands[band]))
        return clusters.listed()
    finally:
        del bands
        path.unlink(missing_ok=True)


def take_whole_clusters(order: Iterable[int], clusters: Sequence[Sequence[int]], quota: int) -> list[int]:
    """The first `quota` of `order` so that no cluster is divided: one that does not fit any more is passed over."""
    cluster_of = {member: cluster for cluster in clusters for member in cluster}
    taken: list[int] = []
    seen: set[int] = set()
    documents = list(order)
    known = set(documents)
    for document in documents:
        if len(taken) >= quota:
            break
        if document in seen:
            continue
        members = [member for member in cluster_of.get(document, (document,)) if member in known]
        seen.update(members)
        if len(taken) + len(members) <= quota:
            taken += members
    return taken


def shingles(text: str) -> np.ndarray:
    """Distinct character 5-grams of a text as sorted 32-bit hashes; case and white space do not count."""
    plain = " ".join(text[:COMPARED_CHARACTERS].casefold().split())
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    width = min(SHINGLE_CHARACTERS, len(codes))
    count = len(codes) - width + 1 if width else 0
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(width):
        hashes = (hashes + codes[offset : offset + count]) * _MULTIPLIER
    hashes = (hashes ^ (hashes >> np.uint64(33))) * _MIXER
    # np.unique takes a hash table since numpy 2.3, which is ten times slower than sorting
    ordered = np.sort((hashes >> np.uint64(32)).astype(np.uint32))
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if count else ordered


def _fill(bands: np.ndarray, parts: Sequence[Dataset]) -> np.ndarray:
    """Writes the bands of every document; returns how many distinct 5-grams each has."""
    sizes = np.zeros(bands.shape[1], dtype=np.int32)
    at = 0
    with Progress("near duplicates", total=bands.shape[1], unit="document") as bar:
        for part in parts:
            for batch in part.select_columns(["text"]).iter(batch_size=DOCUMENTS_PER_BATCH):
                rows = np.zeros((len(batch["text"]), BANDS), dtype=np.uint32)
                for number, text in enumerate(batch["text"]):
                    grams = shingles(text)
                    sizes[at + number] = len(grams)
                    rows[number] = _bands(grams) if len(grams) else at + number
                bands[:, at : at + len(rows)] = rows.T
                at += len(rows)
                bar.advance(len(rows))
    return sizes


def _bands(grams: np.ndarray) -> np.ndarray:
    """25 hashes of a document: of 5 bins each, a bin's smallest 5-gram; an empty bin has its right neighbour's."""
    first = np.searchsorted(grams, _BIN_STARTS)
    # behind the last 5-gram it begins again at the first
    nearest = np.where(first == len(grams), 0, first)
    minima = grams[nearest].astype(np.uint64)
    distance = (minima >> np.uint64(25)) - np.arange(BINS, dtype=np.uint64)
    minima = minima * _MULTIPLIER + distance * _MIXER
    rows = minima[: BANDS * ROWS].reshape(BANDS, ROWS)
    combined = np.zeros(BANDS, dtype=np.uint64)
    for row in range(ROWS):
        combined = (combined ^ rows[:, row]) * _MIXER
    return (combined >> np.uint64(32)).astype(np.uint32)


class _Clusters:
    """Union-find over documents; two are joined when their 5-grams say so."""

    def __init__(self, parts: Sequence[Dataset], sizes: np.ndarray):
        self._parts, self._sizes = parts, sizes
        self._parent = np.arange(len(sizes), dtype=np.int64)
        self._grams = lru_cache(maxsize=256)(lambda position: shingles(self._text(position)))

    def join_equal(self, keys: np.ndarray) -> None:
        """Compare documents that have the same key: each with the one before it and with the first of them."""
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        first = 0
        for number, at in enumerate(same.tolist()):
            if number == 0 or at != same[number - 1] + 1:
                first = int(order[at])
            self._join(int(order[at]), int(order[at + 1]))
            self._join(first, int(order[at + 1]))

    def listed(self) -> list[list[int]]:
        """The clusters of two and more."""
        roots = np.array([self._root(position) for position in range(len(self._parent))])
        _, inverse, counts = np.unique(roots, return_inverse=True, return_counts=True)
        members: dict[int, list[int]] = defaultdict(list)
        for position in np.flatnonzero(counts[inverse] > 1).tolist():
            members[int(roots[position])].append(position)
        return sorted(members.values())

    def _join(self, one: int, other: int) -> None:
        one_root, other_root = self._root(one), self._root(other)
        if one_root != other_root and self._are_near(one, other):
            self._parent[max(one_root, other_root)] = min(one_root, other_root)

    def _are_near(self, one: int, other: int) -> bool:
        small, large = sorted((int(self._sizes[one]), int(self._sizes[other])))
        if not small or small < NEAR_JACCARD * large:
            return False
        shared = len(np.intersect1d(self._grams(one), self._grams(other), assume_unique=True))
        return shared >= NEAR_JACCARD * (small + large - shared)

    def _root(self, position: int) -> int:
        while self._parent[position] != position:
            self._parent[position] = self._parent[self._parent[position]]
            position = int(self._parent[position])
        return position

    def _text(self, position: int) -> str:
        for part in self._parts:
            if position < len(part):
                return part[position]["text"]
            position -= len(part)
        raise IndexError(position)
