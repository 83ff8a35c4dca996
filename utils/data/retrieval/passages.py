"""BM25 over passages of the corpus. The words are the model tokenizer's ids, so every script has words.

Passages are cut by tokens, in each document from its beginning, and do not overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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


def question_ids(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a question is looked up by; as in running text, where a word follows a blank."""
    return chat.text_ids(tokenizer, [f" {example['question']}"])[0]
