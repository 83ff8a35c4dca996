"""Examples with passages in front of their own context: as many, best first, as the prompt has room for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.data.prepared import Prepared
from utils.data.retrieval.passages import PassageIndex, cut, question_ids
from utils.data.retrieval.withheld_passages import holding_the_question
from utils.data.tables import ProblemList, read_text
from utils.exceptions import DataError, Problem
from utils.logger import event
from utils.models import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what a task adapter is trained with (--task.retrieval); an evaluation chooses its own on dev
TRAINED_PASSAGES, TRAINED_TOKENS = 3, 128
BM25 = "bm25"
MOST_NAMED = 10


def check(retrieval: str, prepared: Prepared) -> None:
    """Raises before anything is trained: no corpus for BM25, or a file without the passages of every test question."""
    if retrieval == BM25:
        prepared.documents("corpus")
    elif retrieval:
        read_passages(Path(retrieval), [str(example["id"]) for example in prepared.examples("test")])


def with_passages(
    example: Mapping[str, Any],
    passages: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    room: int,
) -> tuple[dict[str, Any], int]:
    """The example with the first passages whose prompt fits `room` tokens, and how many these are.

    Its own context stays whole and next to the question; a passage is never cut.
    """
    own = example.get("context")
    best, used = dict(example), 0
    for count in range(1, len(passages) + 1):
        context = "\n\n".join([*passages[:count], *([own] if own else [])])
        longer = {**example, "context": context}
        if len(chat.prompt_ids(tokenizer, longer, system_prompt)) > room:
            break
        best, used = longer, count
    return best, used


def found_in_corpus(
    index: PassageIndex, examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, most: int
) -> list[list[str]]:
    """The texts of the best passages for each example, best first, without those that hold its question's text."""
    banned = holding_the_question(examples, index.passages)
    return [
        [index.passages[at].text for at in index.find(question_ids(example, tokenizer), most, without)]
        for example, without in zip(examples, banned, strict=True)
    ]


def for_training(
    prepared: Prepared,
    splits: Sequence[Sequence[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    longest: int,
) -> list[list[dict[str, Any]]]:
    """Each split's examples with passages of the corpus; a pair is at most `longest` tokens, its answer included.

    Raises ArtefactError when the prepared data have no corpus.
    """
    index = PassageIndex(cut(prepared.documents("corpus"), tokenizer, TRAINED_TOKENS))
    lengthened_splits, counts = [], []
    for examples in splits:
        texts = found_in_corpus(index, examples, tokenizer, TRAINED_PASSAGES)
        lengthened = []
        for example, passages in zip(examples, texts, strict=True):
            answer = chat.answer_ids(tokenizer, example["answers"][0], example.get("reasoning"))
            longer, used = with_passages(example, passages, tokenizer, system_prompt, longest - len(answer))
            lengthened.append(longer)
            counts.append(used)
        lengthened_splits.append(lengthened)
    mean = sum(counts) / max(1, len(counts))
    event("pairs have passages of the corpus", passages_a_pair=round(mean, 2), tokens_each=TRAINED_TOKENS)
    return lengthened_splits


def read_passages(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """A person's own retriever: {"id": ..., "passages": [...]} a line, for every question of `names`.

    Raises DataError with every problem by line: no such file, a malformed line, a question without its passages.
    """
    problems, passages_of = ProblemList(), {}
    if not path.is_file():
        raise DataError(Problem("evaluate.retrieval: no such file", str(path), "bm25, or FILE.jsonl"))
    text = read_text(path, problems)
    problems.raise_if_any()
    fix = 'write {"id": "the question\'s id", "passages": ["...", "..."]}, best first'
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, passages = str(row["id"]), row["passages"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problems.add(f"{path.name}:{number}: no passages ({type(error).__name__}: {error})", None, fix)
            continue
        if not isinstance(passages, list) or not all(isinstance(one, str) for one in passages):
            problems.add(f"{path.name}:{number}: passages is no list of texts", None, fix)
        elif name in passages_of:
            problems.add(f"{path.name}:{number}: this question was there before", name, "give all its passages at once")
        else:
            passages_of[name] = [one for one in passages if one.strip()]
    problems.raise_if_any()
    if missing := [name for name in names if name not in passages_of]:
        what = f"{path.name}: {len(missing)} of {len(names)} test questions have no line"
        raise DataError(Problem(what, missing[:MOST_NAMED], f"{fix}; ids as in task_test.jsonl of the prepared data"))
    return passages_of
