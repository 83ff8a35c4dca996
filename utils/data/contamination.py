"""Contamination: which test items stand in the corpus or in the training pairs, and what that means.

Reads prepared data; returns numbers and ids, so that scores can be given without the flagged items. What is looked for:

    duplicate             a document (or pair) that is the item's question, context and answer, after normalisation
    near duplicate        the same with a Jaccard index of at least 0.8 over character 5-grams (MinHash LSH)
    question and answer   the question's words, and within 100 words of them a gold answer
    question, answer      13 words in a row of it; texts of 8 to 12 words whole; shorter ones are not looked up alone
    context               at least half of its 13-grams

A question of 3 to 7 words counts only together with its answer, 8 words in all. That the answers to questions about
the corpus's own documents stand in the corpus is where their knowledge is supposed to come from, not contamination:
what is flagged depends on whether the questions are about the corpus's documents.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from utils.data.ngram_overlap import (
    SHORTEST_WORDS,
    NearDuplicates,
    NgramIndex,
    contains,
    lookup_width,
    units_per_word,
    words_of,
)
from utils.data.prepared import Prepared
from utils.exceptions import ArtefactError
from utils.progress import Progress

SAME, HELD_OUT, UNKNOWN, NO_CORPUS = "same documents", "held-out documents", "unknown documents", "no corpus"
KINDS = ("duplicate", "near duplicate", "question and answer", "question", "answer", "context")
PAIR_WORDS = 100
SHORTEST_QUESTION = 3
CONTEXT_SHARE = 0.5
NUM_EXAMPLES = 5
DOCUMENTS_PER_BATCH = 100

_ALWAYS = {
    "duplicate": "the item itself was trained on",
    "near duplicate": "the item itself, hardly changed, was trained on",
    "question and answer": "the answer was seen beside its question",
}
_IN_CORPUS = _ALWAYS | {"question": "the question's wording was trained on"}
_FLAGGED = {
    SAME: _IN_CORPUS,
    HELD_OUT: _IN_CORPUS
    | dict.fromkeys(
        ("answer", "context"), "its text was trained on, and its document is not known to be in the corpus"
    ),
    "pairs": _ALWAYS | {"context": "another pair about this passage was trained on"},
}
_EXPECTED = {
    SAME: "the questions are about the corpus's documents: their knowledge is meant to come from there",
    "pairs": "questions share templates and answers repeat; alone neither gives an item away",
}

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Overlap:
    """Test items of which one kind of text stands in one source, with the reason why that is flagged or not."""

    source: str
    kind: str
    is_flagged: bool
    why: str
    items: int
    share: float
    ids: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]
    """(test item, document or pair in which it was found), a few."""


@dataclass(frozen=True)
class Contamination:
    """What was found. `flagged` are the items to leave out when a score is given without them."""

    setting: str
    """same documents, held-out documents, unknown documents (the pairs name none: judged as held out), or no corpus."""
    documents_in_corpus: float
    """Share of the test items whose document is one of the corpus's."""
    test_items: int
    too_short: int
    """Items of which nothing is long enough to be looked up: only duplicates of the whole are found."""
    corpus_documents: int
    overlaps: tuple[Overlap, ...]
    flagged: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The finding for a terminal; kinds without an item are left out."""
        where = f"{self.setting}: the documents of {self.documents_in_corpus:.0%} of the test items are in the corpus"
        looked_up = self.test_items - self.too_short
        lines = [f"{where}; flagged as contaminated {len(self.flagged)} of {self.test_items} test items"]
        if self.too_short:  # nothing is said of what was not looked at
            lines = [f"{where}; {looked_up} of {self.test_items} test items could be looked up"]
            lines[0] += f", flagged as contaminated {len(self.flagged)}" if looked_up or self.flagged else ""
        for overlap in self.overlaps:
            if overlap.items:
                verdict = "flagged" if overlap.is_flagged else "not flagged"
                lines.append(f"  {overlap.kind} in {overlap.source}: {overlap.items} ({verdict}: {overlap.why})")
        if self.too_short:
            lines.append(f"  {self.too_short} items are too short for anything but whole duplicates")
        return lines


def report(prepared: Prepared) -> Contamination:
    """Look for every test item of prepared data in its corpus, its training and its dev pairs.

    The corpus is streamed, so memory does not grow with it. Raises ArtefactError when there are no test pairs.
    """
    began = time.perf_counter()
    tests = prepared.examples("test")
    ids = [str(example["id"]) for example in tests]
    overlaps: list[Overlap] = []
    setting, share, documents = NO_CORPUS, 0.0, 0
    try:
        corpus = prepared.documents("corpus").select_columns(["id", "text"])
    except ArtefactError:
        corpus = None
    if corpus is not None:
        documents, names = len(corpus), _DocumentNames(tests)
        search = _Search(tests, with_context=False)
        with Progress("contamination: corpus", total=documents, unit="document") as bar:
            for batch in corpus.iter(batch_size=DOCUMENTS_PER_BATCH):
                for name, text in zip(batch["id"], batch["text"], strict=True):
                    names.see(name)
                    search.look(name, text, [text])
                bar.advance(len(batch["id"]))
        setting, share = names.setting(), names.share
        overlaps += _overlaps("corpus", setting, search, ids)
    for split in ("train", "dev"):
        search = _Search(tests, with_context=True)
        pairs = prepared.examples(split)
        with Progress(f"contamination: {split} pairs", total=len(pairs), unit="pair") as bar:
            for pair in pairs:
                search.look(str(pair["id"]), _text(pair), _whole(pair, with_context=True))
                bar.advance(1)
        overlaps += _overlaps(split, "pairs", search, ids)
        looked_up = search.looked_up
    flagged = {name for overlap in overlaps if overlap.is_flagged for name in overlap.ids}
    return Contamination(
        setting=setting,
        documents_in_corpus=share,
        test_items=len(tests),
        too_short=len(tests) - len(looked_up),
        corpus_documents=documents,
        overlaps=tuple(overlaps),
        flagged=tuple(name for name in ids if name in flagged),
        seconds=round(time.perf_counter() - began, 2),
    )


class _DocumentNames:
    """Whether the documents that the test items are about are among the corpus's, by name."""

    def __init__(self, tests: Sequence[Example]):
        # the file of the corpus where the pair names one, else its document
        self._named = [str(example.get("source") or example["document"]) for example in tests]
        ids = {example["id"] for example in tests}
        self._alone = all(example["document"] in ids for example in tests)
        self._seen = set[str]()
        self._aliases = {spelled for name in self._named for spelled in (name, PurePosixPath(name).name)}

    def see(self, corpus_id: str) -> None:
        self._seen |= self._aliases.intersection(_spellings(corpus_id))

    @property
    def share(self) -> float:
        return sum(self._is_seen(name) for name in self._named) / len(self._named)

    def _is_seen(self, name: str) -> bool:
        return name in self._seen or PurePosixPath(name).name in self._seen

    def setting(self) -> str:
        # a pair that names no document is one of its own, or goes with the first of the same context
        if not self._seen and self._alone:
            return UNKNOWN
        return SAME if self.share >= 0.5 else HELD_OUT


def _spellings(corpus_id: str) -> Iterator[str]:
    """Names under which pairs may know a document: "a/b.pdf" is also "b.pdf" and "b", "json.dumps" is also "json"."""
    for name in {corpus_id, PurePosixPath(corpus_id).name}:
        yield name
        yield from (name[: mark.start()] for mark in re.finditer(r"[./#:]", name))


class _Search:
    """The texts of the test items, and the items found so far: kind -> {item number: where}."""

    def __init__(self, tests: Sequence[Example], *, with_context: bool):
        self.matches: dict[str, dict[int, str]] = {kind: {} for kind in KINDS}
        self._questions = [words_of(example["question"]) for example in tests]
        self._answers = [[words_of(answer) for answer in example["answers"]] for example in tests]
        self._has_context = [bool(example.get("context")) for example in tests]
        # a templated question asked of another passage is another item, so from pairs it needs its context
        self._asks_alone = [not (with_context and has) for has in self._has_context]
        texts, widths, self._parts = [], [], []
        for number, example in enumerate(tests):
            parts = [("question", self._questions[number]), *(("answer", words) for words in self._answers[number])]
            parts += [("context", words_of(example["context"]))] if self._has_context[number] else []
            for part, words in parts:
                texts.append(words)
                widths.append(lookup_width(words) or (part == "question") * self._short_width(number))
                self._parts.append((number, part))
        self._index = NgramIndex(texts, widths)
        self._context_grams: dict[int, dict[int, str]] = {}
        whole = [(n, w) for n, example in enumerate(tests) for w in _whole(example, with_context=with_context)]
        self._whole = [words_of(text) for _, text in whole]
        self._whole_of = [number for number, _ in whole]
        self._near = NearDuplicates(self._whole)

    @property
    def looked_up(self) -> set[int]:
        """Items of which anything is long enough."""
        return {number for (number, _), width in zip(self._parts, self._index.widths, strict=True) if width}

    def look(self, name: str, text: str, wholes: Iterable[str]) -> None:
        """Look for every item in a document: n-grams in its text, duplicates of the `wholes`."""
        words = words_of(text)
        for hit in self._index.find(words):
            number, part = self._parts[hit.text]
            if part == "context":
                self._context_grams.setdefault(hit.text, {}).setdefault(hit.start, name)
            elif part == "answer":
                self.matches["answer"].setdefault(number, name)
            elif self._asks_alone[number]:
                end = hit.at + self._index.widths[hit.text] + PAIR_WORDS
                if self._answer_in(number, " ".join(words[max(0, hit.at - PAIR_WORDS) : end])):
                    self.matches["question and answer"].setdefault(number, name)
                elif lookup_width(self._questions[number]):
                    self.matches["question"].setdefault(number, name)
        for whole in wholes:
            own = words_of(whole)
            for at, _ in self._near.find(own):
                kind = "duplicate" if own == self._whole[at] else "near duplicate"
                self.matches[kind].setdefault(self._whole_of[at], name)

    def finish(self) -> dict[str, dict[int, str]]:
        """What was found, an item once for its question and once for its being a duplicate."""
        for text, grams in self._context_grams.items():
            if len(grams) >= CONTEXT_SHARE * self._index.num_grams(text):
                self.matches["context"][self._parts[text][0]] = next(iter(grams.values()))
        for more, less in (("duplicate", "near duplicate"), ("question and answer", "question")):
            for number in self.matches[more]:
                self.matches[less].pop(number, None)
        return self.matches

    def _short_width(self, number: int) -> int:
        length = len(self._questions[number])
        shortest = min(map(len, self._answers[number]))
        scale = units_per_word(self._questions[number])
        is_enough = length >= SHORTEST_QUESTION * scale and length + shortest >= SHORTEST_WORDS * scale
        return length if is_enough else 0

    def _answer_in(self, number: int, passage: str) -> bool:
        return any(
            contains(passage, words[at : at + width])
            for words in self._answers[number]
            if words and (width := lookup_width(words) or len(words))
            for at in range(len(words) - width + 1)
        )


def _overlaps(source: str, setting: str, search: _Search, ids: Sequence[str]) -> Iterator[Overlap]:
    flags = _FLAGGED[HELD_OUT if setting == UNKNOWN else setting]
    for kind, where in search.finish().items():
        numbers = sorted(where)
        yield Overlap(
            source=source,
            kind=kind,
            is_flagged=kind in flags,
            why=flags.get(kind) or _EXPECTED[setting],
            items=len(numbers),
            share=len(numbers) / len(ids),
            ids=tuple(ids[number] for number in numbers),
            examples=tuple((ids[number], where[number]) for number in numbers[:NUM_EXAMPLES]),
        )


def _text(pair: Example) -> str:
    return "\n".join([pair["question"], *pair["answers"], pair.get("context") or ""])


def _whole(example: Example, *, with_context: bool) -> list[str]:
    """The item as one text, once for each gold answer."""
    context = example.get("context") or "" if with_context else ""
    return [f"{example['question']}\n{context}\n{answer}" for answer in example["answers"]]
