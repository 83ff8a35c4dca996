"""Prepared data: what `scripts/prepare_data.py` writes and every later stage reads.

data/prepared/<run>/   corpus/  dev_documents/  heldout_documents/     Arrow: id, text, input_ids, num_tokens
                       task_train.jsonl  task_dev.jsonl  task_test.jsonl     the common format, one example a line
                       manifest.json                                         counts, what was dropped and why
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import DataSection, TaskSection
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.data import early_warnings
from utils.data.corpus import prepared_documents
from utils.data.domains.built_in import BuiltIn
from utils.data.domains.invented import invented_domain
from utils.data.domains.python_demo import other_modules, python_demo
from utils.data.labelled import labelled_pairs
from utils.data.splits import SPLITS as SPLITS
from utils.exceptions import ArtefactError, ConfigError, DataError, Problem
from utils.logger import event, warning
from utils.models.base_model import BaseModel

if TYPE_CHECKING:
    from datasets import Dataset

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
    task: TaskSection | None = None,
) -> tuple[Run, bool]:
    """The prepared run in `directory` and whether it was there already, else published there; `task` as in `prepare`.

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
        counts.update(prepare(data, base, seed, temporary, task))
        if finish is not None:
            finish(temporary, counts)
    event("data prepared", path=directory)
    return Run(directory, files.verify(directory, hash_files=False)), False


def prepare(
    data: DataSection, base: BaseModel, seed: int, directory: Path, task: TaskSection | None = None
) -> dict[str, Any]:
    """Read, clean, split, tokenise and write everything to `directory`; returns the counts for the manifest.

    `task` says how the pairs will be rendered (system prompt, turns); it decides only what is counted and shown.
    """
    cache = directory / ".reading"
    domain = built_in_domain(data, seed)
    parts: dict[str, Dataset] = {}
    problems: list[Problem] = []
    try:
        counts: dict[str, Any] = {}
        # pairs are read before the documents are tokenised: what is wrong with either is said in minutes, and at once
        if data.corpus != (NONE,):
            with _collected(problems):
                parts, counts["documents"] = prepared_documents.read(data, domain, base, seed, cache)
        if data.task != NONE:
            with _collected(problems):
                pairs = labelled_pairs.prepare(data, domain, base, seed, directory, cache, task or TaskSection(), parts)
                counts["sequence_tokens"], counts["examples"] = pairs.pop("sequence_tokens"), pairs
        if problems:
            raise DataError(problems)
        sentences = early_warnings.labelled(counts.get("examples", {}))
        if parts:
            sentences += early_warnings.held_out(data, {name: len(part) for name, part in parts.items()})
        for sentence in sentences:
            warning(sentence)
        if parts:
            counts["documents"] |= prepared_documents.write(parts, data, base, directory, cache)
        if domain:
            counts["groups"] = domain.groups
        return counts
    finally:
        shutil.rmtree(cache, ignore_errors=True)


@contextmanager
def _collected(problems: list[Problem]) -> Iterator[None]:
    """What is wrong with the sources, kept until all of them were looked at."""
    try:
        yield
    except (ConfigError, DataError, ArtefactError) as error:
        problems += error.problems


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
