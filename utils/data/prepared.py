"""Prepared data: what `scripts/prepare_data.py` writes and every later stage reads.

data/prepared/<run>/   corpus/  dev_documents/  heldout_documents/     Arrow: id, text, input_ids, num_tokens
                       task_train.jsonl  task_dev.jsonl  task_test.jsonl     the common format, one example a line
                       manifest.json                                         counts, what was dropped and why
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import BUILT_IN_TASKS, DataSection, TaskSection
from utils import disk
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.data.documents import read_documents
from utils.data.domains.built_in import BuiltIn
from utils.data.domains.invented import invented_domain
from utils.data.domains.python_demo import other_modules, python_demo
from utils.data.labelled import labelled_pairs
from utils.data.splits import SPLITS as SPLITS
from utils.data.splits import hash_share
from utils.exceptions import ArtefactError, Problem
from utils.logger import event
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.chat import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

NONE = "none"
SAMPLED, SAMPLED_CHARACTERS = 256, 10_000
# manifests, counts, labelled pairs
SMALL_FILES = 1 << 20


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
    try:
        counts: dict[str, Any] = {}
        if data.corpus != (NONE,):
            counts["documents"] = _prepare_documents(data, domain, base, seed, directory, cache)
        if data.task != NONE:
            found = labelled_pairs.prepare(data, domain, base, seed, directory, cache, task or TaskSection())
            counts["sequence_tokens"], counts["examples"] = found.pop("sequence_tokens"), found
        if domain:
            counts["groups"] = domain.groups
        return counts
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def space_bytes(parts: Iterable[Dataset], tokenizer: Any) -> int:
    """About what tokenising these documents takes on the disk: texts and int32 ids, while they are made and once kept.

    Tokens are counted on the beginnings of a sample of SAMPLED documents.
    """
    total = 0
    for part in parts:
        chosen = part.select(range(0, len(part), max(1, len(part) // SAMPLED)))
        sample = [text[:SAMPLED_CHARACTERS] for text in chosen["text"]]
        tokens = sum(len(ids) for ids in chat.document_ids(tokenizer, sample))
        texts = part.data.column("text").nbytes * len(part) // max(1, part.data.num_rows)
        total += texts + round(4 * tokens / max(1, sum(len(t.encode()) for t in sample)) * texts)
    return 2 * total + SMALL_FILES


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


def _prepare_documents(
    data: DataSection, domain: BuiltIn | None, base: BaseModel, seed: int, directory: Path, cache: Path
) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    if data.corpus[0] in BUILT_IN_TASKS:
        corpus, report = _from_list(domain.documents), {"dropped": {}}
    else:
        corpus, read = read_documents(data.corpus, cache_dir=cache, hub_revision=data.corpus_revision or None)
        report = read.to_json()
    counts["read"] = report
    order = sorted(range(len(corpus)), key=lambda i, ids=corpus["id"][:]: hash_share(ids[i], seed))
    if data.max_documents:
        counts["beyond_max_documents"] = max(0, len(order) - data.max_documents)
        order = order[: data.max_documents]
    if data.corpus[0] in BUILT_IN_TASKS:
        outside = _from_list(domain.heldout)
    elif data.corpus_heldout:
        outside, _ = read_documents(data.corpus_heldout, cache_dir=cache, hub_revision=data.corpus_revision or None)
    else:
        held = max(2, round(len(order) * data.heldout_share)) if len(order) >= 10 and data.heldout_share else 0
        outside, order = corpus.select(sorted(order[:held])), order[held:]
    # choosing (checkpoints, weights) and reporting never look at the same held-out documents
    halves = sorted(range(len(outside)), key=lambda i, ids=outside["id"][:]: hash_share(ids[i], seed))
    middle = len(halves) // 2
    parts = {"corpus": corpus.select(sorted(order))}
    if middle:
        parts["dev_documents"] = outside.select(sorted(halves[:middle]))
        parts["heldout_documents"] = outside.select(sorted(halves[middle:]))
    tokenizer = load_tokenizer(base.directory)
    disk.require(directory.parent, space_bytes(parts.values(), tokenizer), "preparing these documents")
    for name, part in parts.items():
        event(f"tokenising {name}", documents=len(part))
        tokenised = part.map(
            lambda batch: _tokenise(batch["text"], tokenizer),
            batched=True,
            batch_size=200,
            writer_batch_size=200,
            keep_in_memory=False,
            cache_file_name=str(_fresh(cache / f"{name}.arrow")),
            new_fingerprint=_fingerprint(part, base.tokenizer_digest),
            desc=f"tokenising {name}",
        )
        tokenised.save_to_disk(str(directory / name), max_shard_size="500MB")
        (cache / f"{name}.arrow").unlink(missing_ok=True)
        counts[name] = {
            "documents": len(tokenised),
            "tokens": _total(tokenised, "num_tokens"),
            "bytes": _total(tokenised, "utf8_bytes"),
        }
    return counts


def _fingerprint(documents: Dataset, tokenizer_digest: str) -> str:
    """What `datasets` writes into state.json: its own is random, and equal data would get other digests each time."""
    digest = hashlib.sha256(tokenizer_digest.encode())
    for rows in documents.select_columns(["id", "text"]).iter(batch_size=200):
        for row in zip(rows["id"], rows["text"], strict=True):
            digest.update(files.canonical_json(row).encode())
    return digest.hexdigest()[:16]


def _tokenise(texts: Sequence[str], tokenizer: Any) -> dict[str, list[Any]]:
    ids = [tokens for group in _groups(texts) for tokens in chat.document_ids(tokenizer, group)]
    return {
        "input_ids": ids,
        "num_tokens": [len(tokens) for tokens in ids],
        "utf8_bytes": [len(text.encode("utf-8")) for text in texts],
    }


def _groups(texts: Sequence[str], most_characters: int = 1 << 22) -> Iterator[list[str]]:
    """Consecutive texts: tokenising takes 150 bytes of memory per character, and 200 books have 200 million."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > most_characters:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def _from_list(documents: Iterable[dict[str, str]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list([{"id": d["id"], "text": d["text"]} for d in documents])


def _total(dataset: Dataset, column: str) -> int:
    import numpy as np

    return int(np.sum(dataset.with_format("numpy")[column][:], dtype=np.int64))


def _fresh(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
