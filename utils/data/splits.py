"""Train, dev and test by document: what is tested was written in documents that training never saw.

Pure: examples in, lists of examples out. A document's split depends on its name and the seed alone, so it does not
change with the order of the rows, and hardly when rows or documents are added.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from utils.exceptions import DataError, Problem

Example = dict[str, Any]
SPLITS = ("train", "dev", "test")


def split_by_document(
    examples: Sequence[Example], *, dev_share: float, test_share: float, seed: int
) -> dict[str, list[Example]]:
    """{"train", "dev", "test"}: each document whole in one of them, each of them non-empty, rows in their given order.

    The shares are of documents, and expected values: a hash decides, not a quota. Raises DataError if there are fewer
    than 3 documents or the shares leave nothing for training.
    """
    if dev_share < 0 or test_share < 0 or dev_share + test_share >= 1:
        fix = "both at least 0, their sum below 1; for example 0.1 and 0.2"
        raise DataError(Problem("the shares of dev and test leave no training data", (dev_share, test_share), fix))
    documents = {str(example["document"]) for example in examples}
    if len(documents) < len(SPLITS):
        what = f"{len(documents)} documents cannot be split into train, dev and test by document"
        fix = "give each row the `document` it was written from (3 or more), or separate files for train, dev and test"
        raise DataError(Problem(what, sorted(documents), fix))
    placed = _place(documents, dev_share, test_share, seed)
    return {split: [e for e in examples if placed[str(e["document"])] == split] for split in SPLITS}


def leaks(train: Sequence[Example], other: Sequence[Example]) -> list[Example]:
    """Those of `other` that are also trained in `train`, or the other way round, but for case and white space.

    The same is the whole conversation, system prompt, choices and answers; each assistant turn counts as an answer.
    """
    known = {key for example in train for key in _keys(example)}
    return [example for example in other if not known.isdisjoint(_keys(example))]


def hash_share(key: str, seed: int) -> float:
    """A number in [0, 1), uniform over keys and the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest()
    # 53 bits are what a float holds exactly; with 64 the largest hashes would round up to 1.0
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _place(documents: set[str], dev_share: float, test_share: float, seed: int) -> dict[str, str]:
    shares = sorted((hash_share(document, seed), document) for document in documents)
    groups: dict[str, list[str]] = {split: [] for split in SPLITS}
    for share, document in shares:
        split = "test" if share < test_share else "dev" if share < test_share + dev_share else "train"
        groups[split].append(document)
    for split in SPLITS:
        if not groups[split]:
            # the largest group gives the document nearest to the border, so that few documents change sides
            giver = max(SPLITS, key=lambda name: len(groups[name]))
            nearest = -1 if SPLITS.index(giver) > SPLITS.index(split) else 0
            groups[split].append(groups[giver].pop(nearest))
    return {document: split for split, members in groups.items() for document in members}


def _keys(example: Example) -> Iterator[tuple[Any, ...]]:
    """What is asked and answered: of the last answer, and of each assistant turn before it."""
    tools = json.dumps(example["tools"], sort_keys=True, ensure_ascii=False) if example.get("tools") else ""
    system = _normal(example.get("system") or "") + tools
    question = {"role": "user", "content": example["question"]}
    turns = [*(example.get("history") or []), question, *(example.get("tool_turns") or [])]
    contents = [(turn["role"], _normal(turn["content"]), _calls(turn)) for turn in turns]
    for at, turn in enumerate(turns):
        if at and turn["role"] == "assistant" and turns[at - 1]["role"] != "assistant" and not turn.get("untrained"):
            yield system, tuple(contents[:at]), "", (contents[at][1],), contents[at][2], ()
    answers = tuple(sorted(_normal(answer) for answer in example["answers"]))
    choices = tuple(sorted(_normal(choice) for choice in example.get("choices") or []))
    yield system, tuple(contents), _normal(example.get("context") or ""), answers, _calls(example), choices


def _calls(turn: Example) -> str:
    calls = [call.get("function") for call in turn.get("tool_calls") or []]
    return json.dumps(calls, sort_keys=True, ensure_ascii=False) if calls else ""


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
