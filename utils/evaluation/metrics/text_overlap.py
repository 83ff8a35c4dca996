"""Long answers: chrF and ROUGE-L, from 0 to 1, against the best of the expected answers. In any script."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from utils.data.answer_metrics import normalised


def chrf(text: str, golds: Sequence[str]) -> float:
    """chrF (Popovic 2015) of a single text, by sacrebleu: F2 over character 1- to 6-grams, without white space."""
    if not text.strip():
        return float(not any(gold.strip() for gold in golds))
    return max((_chrf().sentence_score(text, [gold]).score / 100 for gold in golds), default=0.0)


def rouge_l(text: str, golds: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, articles included.

    Words are ours, in a script without blanks each character; `rouge-score` keeps a-z and digits alone, and gives
    identical texts in other scripts 0.
    """
    return max((_f1(_words(text), _words(gold)) for gold in golds), default=0.0)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, a word of `second` at a time with a bit for each of `first` (Hyyro 2004)."""
    places: dict[str, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << at
    every = (1 << len(first)) - 1
    open_ends = every
    for word in second:
        taken = open_ends & places.get(word, 0)
        open_ends = ((open_ends + taken) | (open_ends - taken)) & every
    return len(first) - open_ends.bit_count()


def _words(text: str) -> list[str]:
    return normalised(text, keep_articles=True).split()


def _f1(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    return 2 * longest_common_subsequence(prediction, gold) / (len(prediction) + len(gold))


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
