"""Text that stands in two places: word n-grams found in a stream of documents, and near duplicates of whole texts.

Pure: text in, positions out. Only the texts that are looked for are kept (about 100 bytes a word); what they are looked
for in is seen once and forgotten, so it may be larger than memory. Hashes only preselect: every hit is compared word by
word, or shingle by shingle, so nothing here is probable, except that one pair in 20,000 exactly at the threshold of a
near duplicate is missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from utils.data.answer_metrics import is_unspaced, normalised

# GPT-3's contamination study (Brown et al. 2020, arXiv:2005.14165, appendix C): 13 words, shorter texts whole, and
# nothing below 8 words, which collides by chance
NGRAM_WORDS = 13
SHORTEST_WORDS = 8
# a word of Chinese or Japanese has about one and a half characters
CHARACTERS_PER_WORD = 1.5
# near duplicates: sets of character 5-grams, and the Jaccard index at which Lee et al. 2022 (arXiv:2107.06499) drop
SHINGLE_CHARACTERS = 5
NEAR_JACCARD = 0.8
# bands x rows: finds a pair of Jaccard 0.8 with probability 1 - (1 - 0.8^5)^25 = 0.99995, one of 0.3 with 0.06
BANDS, ROWS = 25, 5

_BASE = np.uint64(0x9E3779B97F4A7C15)
_FILTER_BITS = 22


def words_of(text: str) -> list[str]:
    """Words as they are compared: SQuAD's normalisation, that is no case, punctuation or articles."""
    return normalised(text).split()


def lookup_width(words: Sequence[str]) -> int:
    """Words of the n-grams by which a text is looked up: 13, or all of a shorter text; 0 when it is too short.

    Where most words are characters of a script without blanks: 20 and 12 of them.
    """
    scale = units_per_word(words)
    return min(len(words), round(NGRAM_WORDS * scale)) if len(words) >= SHORTEST_WORDS * scale else 0


def units_per_word(words: Sequence[str]) -> float:
    """1, or 1.5 where most of the words are characters of a script without blanks."""
    return CHARACTERS_PER_WORD if 2 * sum(map(is_unspaced, words)) > len(words) else 1


@dataclass(frozen=True)
class Hit:
    """The n-gram at word `start` of looked-up text number `text` stands at word `at` of a document."""

    text: int
    start: int
    at: int


class NgramIndex:
    """Finds the n-grams of some texts in documents; `widths` gives each text's n (0 leaves it out)."""

    def __init__(self, texts: Sequence[Sequence[str]], widths: Sequence[int]):
        self.texts, self.widths = texts, widths
        self._tables: dict[int, _Table] = {}
        for width in sorted(set(widths) - {0}):
            members = [number for number, own in enumerate(widths) if own == width]
            grams = [_rolled(_hashed(texts[number]), width) for number in members]
            owners = np.repeat(np.array(members), [len(own) for own in grams])
            starts = np.concatenate([np.arange(len(own)) for own in grams])
            self._tables[width] = _Table(np.concatenate(grams), owners, starts)

    def num_grams(self, text: int) -> int:
        """How many n-grams of a text are looked for."""
        width = self.widths[text]
        return max(0, len(self.texts[text]) - width + 1) if width else 0

    def find(self, document: Sequence[str]) -> Iterator[Hit]:
        """Every occurrence of a looked-up n-gram in a document's words."""
        hashes = _hashed(document)
        for width, table in self._tables.items():
            for at, entry in table.candidates(_rolled(hashes, width)):
                text, start = int(table.owners[entry]), int(table.starts[entry])
                if document[at : at + width] == self.texts[text][start : start + width]:
                    yield Hit(text, start, at)


class NearDuplicates:
    """Finds those of some texts whose character 5-grams have a Jaccard index of at least 0.8 with a document's."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        from datasketch import MinHash, MinHashLSH

        self._empty = MinHash(num_perm=BANDS * ROWS, hashfunc=int)
        self._index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
        self._shingles = [_shingles(" ".join(words)) for words in texts]
        self._longest = max((len(" ".join(words)) for words in texts), default=0)
        for number, shingles in enumerate(self._shingles):
            if len(shingles):
                self._index.insert(number, self._sketch(shingles))

    def find(self, document: Sequence[str]) -> Iterator[tuple[int, float]]:
        """(number of the text, Jaccard index) for each near duplicate of the document."""
        text = " ".join(document)
        # sets whose index is 0.8 differ by a quarter in size at most, so a longer document is not worth a sketch
        if not SHINGLE_CHARACTERS <= len(text) <= self._longest / NEAR_JACCARD:
            return
        shingles = _shingles(text)
        for number in sorted(self._index.query(self._sketch(shingles))):
            shared = len(np.intersect1d(shingles, self._shingles[number], assume_unique=True))
            jaccard = shared / (len(shingles) + len(self._shingles[number]) - shared)
            if jaccard >= NEAR_JACCARD:
                yield number, jaccard

    def _sketch(self, shingles: np.ndarray) -> object:
        sketch = self._empty.copy()
        sketch.update_batch(shingles.tolist())
        return sketch


class _Table:
    """n-grams of one width by their hash; a bitmap rejects nearly every n-gram of a document at once."""

    def __init__(self, hashes: np.ndarray, owners: np.ndarray, starts: np.ndarray):
        order = np.argsort(hashes)
        self.hashes, self.owners, self.starts = hashes[order], owners[order], starts[order]
        self.bitmap = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self.bitmap[_top_bits(hashes)] = True

    def candidates(self, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """(position in `hashes`, entry of this table) of equal hashes."""
        positions = np.flatnonzero(self.bitmap[_top_bits(hashes)])
        lows = np.searchsorted(self.hashes, hashes[positions], "left").tolist()
        highs = np.searchsorted(self.hashes, hashes[positions], "right").tolist()
        for at, low, high in zip(positions.tolist(), lows, highs, strict=True):
            yield from ((at, entry) for entry in range(low, high))


def _hashed(words: Sequence[str]) -> np.ndarray:
    # Python's own hash differs between processes; the result does not, because hits are compared word by word
    return np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)


def _rolled(hashes: np.ndarray, width: int) -> np.ndarray:
    """Polynomial hash, modulo 2^64, of each run of `width` values."""
    count = max(0, len(hashes) - width + 1)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(width):
        # multiplied after the sum: also the last value must reach the top bits
        total = (total + hashes[offset : offset + count]) * _BASE
    return total


def _top_bits(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


def _shingles(text: str) -> np.ndarray:
    """Distinct character 5-grams as sorted 32-bit hashes."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    return np.unique(_rolled(characters, SHINGLE_CHARACTERS) >> np.uint64(32))


def contains(document: str, words: Iterable[str]) -> bool:
    """Whether these words stand one after the other in a document of single-spaced words."""
    return f" {' '.join(words)} " in f" {document} "
