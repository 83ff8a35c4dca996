"""Generated answers as numbers: exact match and token F1 (SQuAD, Rajpurkar et al. 2016), and what is wrong with them.

Pure text in, numbers out. The normalisation is that of the official SQuAD script: lower case, no punctuation, no
articles, single spaces. A script that puts no blanks between its words (Chinese, Japanese, Thai, ...) is compared by
character and without any punctuation of Unicode's, as CMRC (Cui et al. 2019, arXiv:1810.07366) and MLQA (Lewis et al.
2020, arXiv:1910.07475) do; a mark above or below a letter stays with it. Hangul has blanks.
"""

from __future__ import annotations

import re
import string
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence

REFUSALS = (
    "i cannot",
    "i can't",
    "i can not",
    "i'm sorry",
    "i am sorry",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "as an ai",
    "i won't",
    "i apologize",
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_UNSPACED = re.compile(
    # kana, Bopomofo, Han; Thai; Lao; Myanmar; Khmer; Tibetan
    "(?:[\u3005\u3007\u3041-\u3096\u30a1-\u30fa\u30fc-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]|[\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46]|[\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf]|"
    "[\u1000-\u102a\u103f\u1050-\u1055]|[\u1780-\u17b3]|[\u0f40-\u0f6c])"
    # what stands above, below or around the letter before it
    "[\u3099\u309a\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u1056-\u1059\u17b4-\u17d3"
    "\u0f71-\u0f84\u0f90-\u0fbc]*"
)


def normalised(text: str, *, keep_articles: bool = False) -> str:
    """Text as it is compared; in a script without blanks each character is a word."""
    if _UNSPACED.search(text):
        text = unicodedata.normalize("NFKC", text)
        text = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in text)
        text = _UNSPACED.sub(r" \g<0> ", text)
    text = text.lower().translate(_PUNCTUATION)
    return " ".join((text if keep_articles else re.sub(r"\b(a|an|the)\b", " ", text)).split())


def is_unspaced(word: str) -> bool:
    """Whether a word of a normalised text is a character of a script without blanks."""
    return _UNSPACED.match(word) is not None


def exact_match(text: str, golds: Sequence[str]) -> float:
    """1 when the text equals one of the expected answers after normalisation, else 0."""
    return float(any(normalised(text) == normalised(gold) for gold in golds))


def token_f1(text: str, golds: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, against the best of the expected answers."""
    return max((_f1(normalised(text).split(), normalised(gold).split()) for gold in golds), default=0.0)


def fault(text: str, finish_reason: str) -> str:
    """What is wrong with an answer whatever was asked: empty, repetitive, runaway, refusal; or an empty string."""
    if not text.strip():
        return "empty"
    if is_repetitive(text):
        return "repetitive"
    if finish_reason == "length":
        return "runaway"
    if text.strip().lower().replace("’", "'").startswith(REFUSALS):
        return "refusal"
    return ""


def is_repetitive(text: str) -> bool:
    """One 4-gram makes up a third of all, or 200 characters and more compress to less than a fifth."""
    words = text.split()
    grams = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3))
    if len(words) >= 12 and 3 * max(grams.values()) >= sum(grams.values()):
        return True
    data = text.encode()
    return len(data) >= 200 and len(zlib.compress(data)) < len(data) / 5


def _f1(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:  # no words in both: 1, as in the script of SQuAD 2.0; that of 1.1 gives 0
        return float(prediction == gold)
    shared = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * shared / (len(prediction) + len(gold))
