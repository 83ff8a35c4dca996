"""Labelled pairs of a run: read, looked at as the model will see them, split by document, written as jsonl.

Writes task_train.jsonl, task_dev.jsonl and task_test.jsonl; returns what became of every row, for the manifest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import BUILT_IN_TASKS, DataSection, TaskSection
from utils.artifacts import files
from utils.data.domains.built_in import BuiltIn
from utils.data.examples import read_task_examples
from utils.data.labelled import headings, token_lengths
from utils.data.labelled.groups import spellings
from utils.data.pair_rows import refuse_reasoning
from utils.data.splits import SPLITS, hash_share, leaks, split_by_document
from utils.exceptions import DataError, Problem
from utils.logger import event, warning
from utils.models import chat, turn_format
from utils.models.base_model import BaseModel

if TYPE_CHECKING:
    from datasets import Dataset

Splits = dict[str, list[dict[str, Any]]]
NAMED_ROWS = 5


def prepare(
    data: DataSection,
    domain: BuiltIn | None,
    base: BaseModel,
    seed: int,
    directory: Path,
    cache: Path,
    task: TaskSection,
    documents: Mapping[str, Dataset],
) -> dict[str, Any]:
    """Read, split and write the pairs; returns their counts and `sequence_tokens`, the length that they ask for.

    `documents` are those of the corpus and outside it (columns id and text), which pairs may name.
    """
    counts: dict[str, Any] = {}
    tokenizer = chat.load_tokenizer(base.directory)
    is_built_in = data.task in BUILT_IN_TASKS
    if is_built_in:
        splits, counts["dropped"] = domain.examples if domain else {}, dict(domain.dropped if domain else {})
    else:
        splits, counts = _read_splits(data, seed, cache, tokenizer, task.system_prompt, documents)
    if not turn_format.has_place_for_reasoning(tokenizer):
        refuse_reasoning([one for examples in splits.values() for e in examples for one in _thoughts(e, task)])
    limits = {"train": data.max_train_examples, "dev": data.max_dev_examples, "test": data.max_test_examples}
    kept: Splits = {}
    for split, examples in splits.items():
        if limits[split] and len(examples) > limits[split]:
            chosen = {e["id"] for e in sorted(examples, key=lambda e: hash_share(e["id"], seed))[: limits[split]]}
            counts[f"{split} pairs beyond max_{split}_examples"] = len(examples) - limits[split]
            examples = [e for e in examples if e["id"] in chosen]
        lines = [json.dumps(example, ensure_ascii=False) for example in examples]
        files.write_text(directory / f"task_{split}.jsonl", "\n".join(lines) + "\n")
        kept[split] = examples
        answers = [_answer_tokens(tokenizer, example) for example in examples]
        counts[split] = {
            "examples": len(examples),
            "documents": len({e["document"] for e in examples}),
            "with_choices": sum(bool(e.get("choices")) for e in examples),
            "answer_tokens": sum(answers),
        }
    measured = token_lengths.measure(kept, tokenizer, task)
    limit = token_lengths.row_tokens(measured, base) if not is_built_in else token_lengths.USUAL
    used = task.train.max_sequence_tokens or limit
    counts["lengths"] = token_lengths.against(measured, used)
    token_lengths.warn(counts["lengths"])
    return counts | {"sequence_tokens": limit}


def _thoughts(example: dict[str, Any], task: TaskSection) -> Iterator[dict[str, Any]]:
    """The reasoning of each turn that will be trained or scored, under the pair's id."""
    yield {"id": example["id"], "reasoning": example.get("reasoning")}
    for turn in [*example["history"], *example.get("tool_turns", [])] if task.turns == "all" else []:
        if not turn.get(chat.UNTRAINED):
            yield {"id": example["id"], "reasoning": turn.get("reasoning_content")}


def _answer_tokens(tokenizer: Any, example: dict[str, Any]) -> int:
    text, calls = example["answers"][0], example.get("tool_calls")
    return len(chat.answer_ids(tokenizer, text, example.get("reasoning"), calls=calls))


def _read_splits(
    data: DataSection,
    seed: int,
    cache: Path,
    tokenizer: Any,
    system_prompt: str,
    documents: Mapping[str, Dataset],
) -> tuple[Splits, dict[str, Any]]:
    """Train, dev and test from the person's files; what is missing is split off by document."""
    counts: dict[str, Any] = {"read": {}}
    given: Splits = {}
    for split, source in (("train", data.task), ("dev", data.task_dev), ("test", data.task_test)):
        if not source:
            continue
        revision = data.task_revision or None
        examples, report = read_task_examples(
            source, cache_dir=cache, hub_revision=revision, columns=data.columns, corpus=_corpus_names(documents)
        )
        event("labelled pairs read", file=source, rows=report.rows, used=report.examples)
        facts = report.to_json() | {"source": source}
        given[split], left_out = _written(examples, tokenizer, system_prompt)
        facts["examples"] = len(given[split])
        facts["dropped"] = {**facts["dropped"], **left_out}
        counts["read"][split] = facts
    dropped = {reason: n for facts in counts["read"].values() for reason, n in facts["dropped"].items()}
    if not all(given.values()):
        _refuse_empty([split for split in given if not given[split]], dropped)
    named = counts["read"]["train"]["documents"]
    if set(given) != set(SPLITS) and (most := named.get("most")) and not _divided(given["train"], named, documents):
        fix = (
            "name a column that divides it, as --data.columns document=SECTION; or give dev and test as files of their "
            "own; or leave it out, --data.columns ignore=COLUMN, which splits by pair"
        )
        raise DataError(Problem(f"{most}: a split by document would leave little to train or to test on", fix=fix))
    if set(given) == {"train"}:
        try:
            splits = split_by_document(given["train"], dev_share=data.dev_share, test_share=data.test_share, seed=seed)
        except DataError as error:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items() if number)
            raise DataError(
                [*error.problems, *([Problem(f"left out before: {reasons}")] if reasons else [])]
            ) from error
    elif set(given) == set(SPLITS):
        splits = given
    else:
        missing = "dev" if "dev" not in given else "test"
        share = data.dev_share if missing == "dev" else data.test_share
        splits = given | _split_off(given["train"], missing, share, seed)
    counts["dropped"] = {}
    for later, earlier in (("test", "train"), ("dev", "train"), ("test", "dev")):
        leaked = {id(example) for example in leaks(splits[later], splits[earlier])}
        splits[earlier] = [example for example in splits[earlier] if id(example) not in leaked]
        counts["dropped"][f"{earlier} pairs that are in {later}"] = len(leaked)
    if empty := [split for split in SPLITS if not splits[split]]:
        _refuse_empty(empty, dropped | counts["dropped"])
    return splits, counts


def _refuse_empty(empty: Sequence[str], dropped: dict[str, int]) -> None:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items() if number)
    what = f"no labelled pairs left for {' and '.join(empty)}{f'; left out: {reasons}' if reasons else ''}"
    raise DataError(Problem(what, fix="give more, or separate files"))


def _written(
    examples: list[dict[str, Any]], tokenizer: Any, system_prompt: str
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The pairs that the chat template can write, answers that call tools as it writes them, and why others are not.

    Raises DataError when the template refuses a conversation altogether.
    """
    kept: list[dict[str, Any]] = []
    reasons: dict[str, list[str]] = {}
    refused: list[Problem] = []
    for example in examples:
        try:
            missing = chat.unwritten(tokenizer, example, system_prompt)
        except chat.TemplateError as error:
            refused.append(Problem(f"{example['id']}: {error}"))
            continue
        if not missing and example.get("tool_calls"):
            try:
                written = chat.answer_with_calls(tokenizer, example, example["tool_calls"], system_prompt)
                example = {**example, "answers": [written]}
            except chat.TemplateError as error:
                missing = [str(error)]
        if missing:
            reasons.setdefault(f"not in the prompt that the chat template makes: {', '.join(missing)}", []).append(
                str(example["id"])
            )
        else:
            kept.append(example)
    if refused:
        fix = "change the order of its turns, or take another base model"
        more = len(refused) - 20
        shown = [*refused[:20], *([Problem(f"and {more:,} more")] if more > 0 else [])]
        raise DataError([*shown[:-1], replace(shown[-1], fix=fix)])
    for reason, names in reasons.items():
        warning(f"pairs left out, {reason}", number=len(names), rows=", ".join(names[:NAMED_ROWS]))
    return kept, {reason: len(names) for reason, names in reasons.items()}


def _divided(examples: list[dict[str, Any]], named: dict[str, Any], documents: Mapping[str, Dataset]) -> bool:
    """Make the headings of the document that holds most pairs documents of their own, where the corpus has it."""
    top = Counter(example["document"] for example in examples).most_common(1)[0][0]
    own = [example for example in examples if example["document"] == top]
    names = spellings(top) | spellings(own[0].get("source") or top)
    text = next((text for name, text in _corpus_texts(documents) if not names.isdisjoint(_called(name))), None)
    titles = headings.parts(own, text) if text else None
    if titles is None or 2 * Counter(titles).most_common(1)[0][1] > len(examples):
        return False
    for example, title in zip(own, titles, strict=True):
        example["source"] = example.get("source") or top
        example["document"] = f"{top} > {title}" if title else top
    column = next(iter(named["document"]))
    named["document"][column] += f", divided by {len(set(titles))} headings of the corpus, because {named.pop('most')}"
    return True


def _split_off(examples: Sequence[dict[str, Any]], name: str, share: float, seed: int) -> Splits:
    documents = sorted({e["document"] for e in examples}, key=lambda d: hash_share(d, seed))
    if len(documents) < 2:
        raise DataError(
            Problem(f"one document cannot be split into train and {name}", documents, f"give --data.task_{name} FILE")
        )
    off = set(documents[: max(1, round(share * len(documents)))])
    return {
        "train": [e for e in examples if e["document"] not in off],
        name: [e for e in examples if e["document"] in off],
    }


def _corpus_names(documents: Mapping[str, Dataset]) -> Callable[[Collection[str]], set[str]]:
    """Which of some names are documents of the corpus or outside it; their ids are streamed."""

    def known(names: Collection[str]) -> set[str]:
        matches: set[str] = set()
        for part in documents.values() if names else ():
            for batch in part.select_columns(["id"]).iter(batch_size=1000):
                matches.update(name for one in batch["id"] for name in _called(one) if name in names)
        return matches

    return known


def _corpus_texts(documents: Mapping[str, Dataset]) -> Iterator[tuple[str, str]]:
    """(id, text) of the documents of the corpus and outside it, one after the other."""
    for part in documents.values():
        for batch in part.select_columns(["id", "text"]).iter(batch_size=100):
            yield from zip(batch["id"], batch["text"], strict=True)


def _called(document: str) -> Iterator[str]:
    """A document's id, its file's name and that without suffix, without the row behind #."""
    for name in (document, document.partition("#")[0]):
        path = Path(name)
        yield from (name, path.name, path.stem)


def shown(examples: Sequence[dict[str, Any]], tokenizer: Any, system_prompt: str, number: int) -> list[dict[str, str]]:
    """The first pairs as the model will see them: prompt and answer as text."""
    pairs = []
    for example in examples[:number]:
        opening = chat.answer_opening(tokenizer, example.get("reasoning"))
        answer = f"{opening}{example['answers'][0]}"
        prompt = chat.prompt_text(tokenizer, example, system_prompt)
        pairs.append({"id": str(example["id"]), "prompt": prompt, "answer": answer})
    return pairs


def reasons(counts: dict[str, Any]) -> Counter[str]:
    """Reason -> pairs left out, over all files and splits."""
    total = Counter[str]()
    for facts in counts.get("read", {}).values():
        total.update(facts["dropped"])
    total.update(counts.get("dropped", {}))
    return total
