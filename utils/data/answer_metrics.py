"""Generated answers as numbers: exact match and token F1 (SQuAD, Rajpurkar et al. 2016), and what is wrong with them.

Pure text in, numbers out. The normalisation is that of the official SQuAD script: lower case, no punctuation, no
articles, single spaces.
"""

from __future__ import annotations

import re
import string
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


def normalised(text: str) -> str:
    """Text as it is compared."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


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


def _f1(found: list[str], gold: list[str]) -> float:
    if not found or not gold:  # no words in both: 1, as in the script of SQuAD 2.0; that of 1.1 gives 0
        return float(found == gold)
    shared = sum((Counter(found) & Counter(gold)).values())
    return 2 * shared / (len(found) + len(gold))
