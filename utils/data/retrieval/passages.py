"""BM25 over passages of the corpus. The words are the model tokenizer's ids, so every script has words.

Passages are cut by tokens, in each document from its beginning, and do not overlap. A passage that holds a question's
own text is kept from that question, by the rules of `contamination`: it gives away the item and not the knowledge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.data.contamination import PAIR_WORDS, SHORTEST_QUESTION
from utils.data.ngram_overlap import SHORTEST_WORDS, NgramIndex, contains, lookup_width, units_per_word, words_of
from utils.models import chat
from utils.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# what a byte-level tokenizer makes of a character that was cut in two
_HALF = "\ufffd"


@dataclass(frozen=True)
class Passage:
    """So many tokens of a document."""

    document: str
    text: str
    ids: tuple[int, ...]


class PassageIndex:
    """Finds the passages of a corpus that share the rarest tokens with a question (BM25, Lucene's form)."""

    def __init__(self, passages: Sequence[Passage]):
        import bm25s

        self.passages = list(passages)
        words = sorted({token for passage in passages for token in passage.ids})
        self._number = {token: at for at, token in enumerate(words)}
        self._bm25 = bm25s.BM25(method="lucene")
        numbered = [[self._number[token] for token in passage.ids] for passage in passages]
        self._bm25.index((numbered, dict(self._number)), create_empty_token=False, show_progress=False)

    def find(self, question: Sequence[int], most: int, without: frozenset[int] = frozenset()) -> list[int]:
        """Numbers of the best passages, best first, of those that share a token; equal ones in the corpus's order."""
        known = [self._number[token] for token in question if token in self._number]
        if not known:
            return []
        scores = np.array(self._bm25.get_scores_from_ids(known))
        scores[list(without)] = 0.0
        order = np.argsort(-scores, kind="stable")[:most]
        return [int(at) for at in order if scores[at] > 0]


def cut(corpus: Dataset, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[Passage]:
    """The corpus as passages of `tokens` tokens; the last one of a document may be shorter."""
    special = set(tokenizer.all_special_ids)
    passages: list[Passage] = []
    with Progress(f"passages of {tokens} tokens", total=len(corpus), unit="document") as bar:
        for row in corpus.select_columns(["id", "input_ids"]):
            ids = [token for token in row["input_ids"] if token not in special]
            pieces = [ids[at : at + tokens] for at in range(0, len(ids), tokens)]
            texts = tokenizer.batch_decode(pieces) if pieces else []
            passages += [
                Passage(str(row["id"]), text.strip(_HALF).strip(), tuple(piece))
                for text, piece in zip(texts, pieces, strict=True)
            ]
            bar.advance(1)
    return [passage for passage in passages if passage.text]


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


def question_ids(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a question is looked up by; as in running text, where a word follows a blank."""
    return chat.text_ids(tokenizer, [f" {example['question']}"])[0]


def _short_width(question: Sequence[str], answers: Sequence[Sequence[str]]) -> int:
    """All of a question that is long enough together with its shortest answer, as in `contamination`; else 0."""
    scale = units_per_word(question)
    shortest = min(map(len, answers))
    is_enough = len(question) >= SHORTEST_QUESTION * scale and len(question) + shortest >= SHORTEST_WORDS * scale
    return len(question) if is_enough else 0


def _is_near(words: Sequence[str], end: int, start: int, answers: Sequence[Sequence[str]]) -> bool:
    near = " ".join(words[max(0, start - PAIR_WORDS) : end + PAIR_WORDS])
    return any(contains(near, answer) for answer in answers if answer)
