"""A part of prepared data: fewer training pairs or fewer documents of the corpus, and everything else as it is.

Parts are nested: a smaller one is inside a larger one, whatever their sizes. Dev, test and held-out data stay.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.artifacts import files, runs
from utils.artifacts.identity import Identity, settings_of
from utils.artifacts.runs import Run
from utils.data.prepared import Prepared
from utils.data.splits import hash_share
from utils.exceptions import ArtefactError, Problem
from utils.models.base_model import BaseModel

CORPUS, TRAIN = "corpus", "task_train.jsonl"


@dataclass(frozen=True)
class Size:
    """How much of the data a training run sees; None is all of it."""

    pairs: int | None = None
    documents: int | None = None


def identity(data: Run, size: Size) -> Identity:
    """What decides a part of `data`."""
    recorded = data.manifest["identity"]
    values = {"part_of": data.digest, "pairs": size.pairs, "documents": size.documents}
    return Identity.of("prepared", values | {"tokenizer": recorded["tokenizer"], "seed": recorded["seed"]})


def make(data: Run, size: Size, base: BaseModel, directory: Path) -> Run:
    """Publish the part of `data` in `directory`. Raises ArtefactError where the data has no such part."""
    decided = identity(data, size)
    if (run := runs.open_run(directory, decided)) is not None:
        return run
    counts: dict[str, Any] = json.loads(json.dumps(data.manifest["counts"]))

    def manifest() -> dict[str, Any]:
        facts = {"counts": counts, "settings": settings_of(data.manifest)}
        return runs.manifest("prepared", decided, base=base.record(), parents=[data], measured={}, **facts)

    with files.publish(directory, manifest) as temporary:
        for path in sorted(data.directory.iterdir()):
            # lm_eval/ asks the test questions of the whole; nobody asks them of a part
            if path.name in (files.MANIFEST, runs.LOG, runs.IDENTITY, "lm_eval") or path.name.startswith("."):
                continue
            if path.is_dir() and not (path.name == CORPUS and size.documents):
                shutil.copytree(path, temporary / path.name)
            elif path.is_file() and not (path.name == TRAIN and size.pairs):
                shutil.copy2(path, temporary / path.name)
        if size.pairs:
            written = _write_pairs(data, size.pairs, temporary / TRAIN)
            counts["examples"]["train"] |= {"examples": written}
            # turns of conversations, as many for a pair as in the whole: more than pairs says that there are some
            lengths = counts["examples"].get("lengths", {}).get("train", {})
            if "turns" in lengths:
                lengths["turns"] = round(lengths["turns"] * written / pairs_of(data))
        if size.documents:
            counts["documents"][CORPUS] |= _write_documents(data, size.documents, temporary / CORPUS)
    return Run(directory, files.verify(directory, hash_files=False))


def pairs_of(data: Run) -> int:
    """Training pairs of prepared data; 0 where there are none."""
    return int(data.manifest["counts"].get("examples", {}).get("train", {}).get("examples", 0))


def document_tokens(data: Run) -> list[int]:
    """Tokens of each document of the corpus, in the order in which parts take them; empty where there is none."""
    if not (data.directory / CORPUS).is_dir():
        return []
    corpus = Prepared(data.directory).documents(CORPUS).select_columns(["id", "num_tokens"])
    tokens = corpus["num_tokens"][:]
    return [int(tokens[at]) for at in _order(corpus["id"][:], data)]


def _write_pairs(data: Run, count: int, path: Path) -> int:
    examples = Prepared(data.directory).examples("train")
    chosen = set(_order([str(example["id"]) for example in examples], data)[:count])
    if len(examples) <= count:
        raise ArtefactError(Problem(f"{data.directory} has no more than {len(examples)} pairs", count))
    lines = (json.dumps(example, ensure_ascii=False) for at, example in enumerate(examples) if at in chosen)
    files.write_text(path, "".join(f"{line}\n" for line in lines))
    return len(chosen)


def _write_documents(data: Run, count: int, path: Path) -> dict[str, int]:
    corpus = Prepared(data.directory).documents(CORPUS)
    if len(corpus) <= count:
        raise ArtefactError(Problem(f"{data.directory} has no more than {len(corpus)} documents", count))
    part = corpus.select(sorted(_order(corpus["id"][:], data)[:count]))
    part.save_to_disk(str(path))
    named = {"tokens": "num_tokens", "bytes": "utf8_bytes"}
    sums = {name: sum(part[column][:]) for name, column in named.items() if column in part.column_names}
    return {"documents": len(part), **sums}


def _order(ids: list[str], data: Run) -> list[int]:
    """Places of documents or pairs by a hash of their id."""
    seed = int(data.manifest["identity"]["seed"])
    return sorted(range(len(ids)), key=lambda at: hash_share(str(ids[at]), seed))
