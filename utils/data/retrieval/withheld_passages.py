"""Which passages are kept from a question: those that hold its own text, by the rules of `contamination`.

Such a passage gives away the item and not the knowledge. One that holds the answer stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from utils.data.contamination import PAIR_WORDS, SHORTEST_QUESTION
from utils.data.ngram_overlap import SHORTEST_WORDS, NgramIndex, contains, lookup_width, units_per_word, words_of
from utils.data.retrieval.passages import Passage


def holding_the_question(examples: Sequence[Mapping[str, Any]], passages: Sequence[Passage]) -> list[frozenset[int]]:
    """For each example the numbers of the passages that hold its question's text, also across a border of two."""
    questions = [words_of(str(example["question"])) for example in examples]
    answers = [[words_of(answer) for answer in example["answers"]] for example in examples]
    widths = [lookup_width(words) or _short_width(words, own) for words, own in zip(questions, answers, strict=True)]
    index = NgramIndex(questions, widths)
    holders: list[set[int]] = [set() for _ in examples]

    def hits(words: Sequence[str]) -> Iterator[int]:
        for hit in index.find(words):
            if lookup_width(questions[hit.text]) or _is_near(
                words, hit.at + widths[hit.text], hit.at, answers[hit.text]
            ):
                yield hit.text

    before: Passage | None = None
    for number, passage in enumerate(passages):
        words = words_of(passage.text)
        own = set(hits(words))
        for text in own:
            holders[text].add(number)
        if before is not None and before.document == passage.document:
            # a cut may go through a word, and the white space at a border is gone
            for joined in (f"{before.text} {passage.text}", before.text + passage.text):
                for text in set(hits(words_of(joined))):
                    if text not in own and number - 1 not in holders[text]:
                        holders[text] |= {number - 1, number}
        before = passage
    return [frozenset(numbers) for numbers in holders]


def _short_width(question: Sequence[str], answers: Sequence[Sequence[str]]) -> int:
    """All of a question that is long enough together with its shortest answer, as in `contamination`; else 0."""
    scale = units_per_word(question)
    shortest = min(map(len, answers))
    is_enough = len(question) >= SHORTEST_QUESTION * scale and len(question) + shortest >= SHORTEST_WORDS * scale
    return len(question) if is_enough else 0


def _is_near(words: Sequence[str], end: int, start: int, answers: Sequence[Sequence[str]]) -> bool:
    near = " ".join(words[max(0, start - PAIR_WORDS) : end + PAIR_WORDS])
    return any(contains(near, answer) for answer in answers if answer)
