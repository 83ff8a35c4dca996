"""Prepared data: what `scripts/prepare_data.py` writes and every later stage reads.

data/prepared/<run>/   corpus/  dev_documents/  heldout_documents/     Arrow: id, text, input_ids, num_tokens
                       task_train.jsonl  task_dev.jsonl  task_test.jsonl     the common format, one example a line
                       manifest.json                                         counts, what was dropped and why
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import BUILT_IN_TASKS, DataSection
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.data.corpus.prepared_documents import prepare_documents
from utils.data.domains.built_in import BuiltIn
from utils.data.domains.invented import invented_domain
from utils.data.domains.python_demo import other_modules, python_demo
from utils.data.examples import read_task_examples
from utils.data.pairs import refuse_reasoning, refuse_unwritable
from utils.data.splits import hash_share, leaks, split_by_document
from utils.exceptions import ArtefactError, DataError, Problem
from utils.logger import event
from utils.models import chat, turn_format
from utils.models.base_model import BaseModel
from utils.models.chat import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "dev", "test")
Splits = dict[str, list[dict[str, Any]]]
NONE = "none"


@dataclass(frozen=True)
class Prepared:
    """A directory of prepared data."""

    directory: Path

    def documents(self, which: str) -> Dataset:
        """`corpus`, `dev_documents` or `heldout_documents`, memory-mapped. Raises ArtefactError when there are none."""
        from datasets import load_from_disk

        if not (self.directory / which).is_dir():
            raise ArtefactError(
                Problem(
                    f"{self.directory} has no {which}",
                    fix="prepare data with --data.corpus PATH (and held-out documents)",
                )
            )
        return load_from_disk(str(self.directory / which))

    def examples(self, split: str) -> list[dict[str, Any]]:
        """The labelled pairs of `train`, `dev` or `test`. Raises ArtefactError when there are none."""
        path = self.directory / f"task_{split}.jsonl"
        if not path.is_file():
            raise ArtefactError(
                Problem(f"{self.directory} has no {split} pairs", fix="prepare data with --data.task FILE")
            )
        # not splitlines(): a question may hold U+2028, at which it would break
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def make(
    data: DataSection,
    base: BaseModel,
    seed: int,
    directory: Path,
    identity: Identity,
    finish: Callable[[Path, dict[str, Any]], None] | None = None,
) -> tuple[Run, bool]:
    """The prepared run in `directory` and whether it was there already, else published there.

    `finish(directory, counts)` writes what belongs beside it.
    """
    if (run := runs.open_run(directory, identity)) is not None:
        event("the data is already prepared", path=directory)
        return run, True
    counts: dict[str, Any] = {}

    def manifest() -> dict[str, Any]:
        facts = {"counts": counts, "settings": {"data": data.model_dump(mode="json")}}
        return runs.manifest("prepared", identity, base=base.record(), parents=[], measured={}, **facts)

    with files.publish(directory, manifest) as temporary:
        counts.update(prepare(data, base, seed, temporary))
        if finish is not None:
            finish(temporary, counts)
    event("data prepared", path=directory)
    return Run(directory, files.verify(directory, hash_files=False)), False


def prepare(data: DataSection, base: BaseModel, seed: int, directory: Path) -> dict[str, Any]:
    """Read, clean, split, tokenise and write everything to `directory`; returns the counts for the manifest."""
    cache = directory / ".reading"
    domain = built_in_domain(data, seed)
    try:
        counts: dict[str, Any] = {}
        if data.corpus != (NONE,):
            counts["documents"] = prepare_documents(data, domain, base, seed, directory, cache)
        if data.task != NONE:
            counts["examples"] = _prepare_examples(data, domain, base, seed, directory, cache)
        if domain:
            counts["groups"] = domain.groups
        return counts
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def built_in_domain(data: DataSection, seed: int) -> BuiltIn | None:
    """The domain that the settings name instead of files, or None."""
    named = {data.task, *data.corpus}
    if "python_docs" in named:
        return python_demo(seed)
    if "python_docs_other" in named:
        return other_modules(seed)
    if not named & {"invented", "invented_shuffled"}:
        return None
    return invented_domain(
        towns=data.invented_towns,
        attributes=data.invented_attributes,
        dev_share=data.dev_share,
        test_share=data.test_share,
        shuffled="invented_shuffled" in named,
        seed=seed,
    )


def _prepare_examples(
    data: DataSection, domain: BuiltIn | None, base: BaseModel, seed: int, directory: Path, cache: Path
) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    if data.task in BUILT_IN_TASKS:
        splits, counts["dropped"] = domain.examples, dict(domain.dropped)
    else:
        splits, counts = _read_splits(data, seed, cache)
    limits = {"train": data.max_train_examples, "dev": data.max_dev_examples, "test": data.max_test_examples}
    tokenizer = load_tokenizer(base.directory)
    if not turn_format.has_place_for_reasoning(tokenizer):
        refuse_reasoning([example for examples in splits.values() for example in examples])
    refuse_unwritable(tokenizer, [example for examples in splits.values() for example in examples])
    for split, examples in splits.items():
        if limits[split] and len(examples) > limits[split]:
            kept = {e["id"] for e in sorted(examples, key=lambda e: hash_share(e["id"], seed))[: limits[split]]}
            examples = [e for e in examples if e["id"] in kept]
        lines = [json.dumps(example, ensure_ascii=False) for example in examples]
        files.write_text(directory / f"task_{split}.jsonl", "\n".join(lines) + "\n")
        answers = [len(chat.answer_ids(tokenizer, e["answers"][0], e.get("reasoning"))) for e in examples]
        counts[split] = {
            "examples": len(examples),
            "documents": len({e["document"] for e in examples}),
            "with_choices": sum(bool(e.get("choices")) for e in examples),
            "answer_tokens": sum(answers),
        }
    return counts


def _read_splits(data: DataSection, seed: int, cache: Path) -> tuple[Splits, dict[str, Any]]:
    """Train, dev and test from the person's files; what is missing is split off by document."""

    def read(source: str, split: str | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        examples, report = read_task_examples(
            source, cache_dir=cache, hub_revision=data.task_revision or None, split=split
        )
        return examples, report.to_json()

    counts: dict[str, Any] = {"read": {}}
    given: dict[str, list[dict[str, Any]]] = {}
    for split, source in (("train", data.task), ("dev", data.task_dev), ("test", data.task_test)):
        if source:
            given[split], counts["read"][split] = read(source, None)
    if set(given) == {"train"}:
        splits = split_by_document(given["train"], dev_share=data.dev_share, test_share=data.test_share, seed=seed)
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
        raise DataError(
            Problem(f"no labelled pairs left for {' and '.join(empty)}", fix="give more, or separate files")
        )
    return splits, counts


def _split_off(
    examples: Sequence[dict[str, Any]], name: str, share: float, seed: int
) -> dict[str, list[dict[str, Any]]]:
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
