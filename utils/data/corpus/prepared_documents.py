"""Documents of prepared data: read, split off what is held out, tokenised, written; with the account of all of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import BUILT_IN_TASKS, DataSection
from utils import disk
from utils.artifacts import files
from utils.data.corpus.first_look import Look
from utils.data.corpus.languages import languages
from utils.data.corpus.near_duplicates import near_duplicate_clusters, take_whole_clusters
from utils.data.corpus.personal_data import personal_data
from utils.data.documents import ReadLimits, read_documents
from utils.data.domains.built_in import BuiltIn
from utils.data.splits import hash_share
from utils.exceptions import DataError, Problem
from utils.logger import event
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.chat import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN, LISTED = 5, 100
SAMPLED, SAMPLED_CHARACTERS = 256, 10_000
# manifests, counts, labelled pairs
SMALL_FILES = 1 << 20


def read(
    data: DataSection, domain: BuiltIn | None, base: BaseModel, seed: int, cache: Path
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Read and split the documents that the settings name: (part -> documents with id and text, counts)."""
    counts: dict[str, Any] = {}
    if data.corpus[0] in BUILT_IN_TASKS:
        corpus, outside = _from_list(domain.documents), _from_list(domain.heldout)
        counts["read"] = {"dropped": {}}
        corpus = _limited(corpus, data.max_documents, seed, counts)
        groups = [[position] for position in range(len(outside))]
    else:
        corpus, outside, groups = _read_and_split(data, base, seed, cache, counts)
    # choosing (checkpoints, weights) and reporting never look at the same held-out documents
    order = _by_hash(outside, seed)
    first_half = sorted(take_whole_clusters(order, groups, len(outside) // 2))
    parts = {"corpus": corpus}
    if first_half:
        parts["dev_documents"] = outside.select(first_half)
        parts["heldout_documents"] = outside.select(sorted(set(order) - set(first_half)))
    return parts, counts


def write(
    parts: dict[str, Dataset], data: DataSection, base: BaseModel, directory: Path, cache: Path
) -> dict[str, Any]:
    """Tokenise each part into `directory`; the counts for the manifest."""
    counts: dict[str, Any] = {}
    tokenizer = load_tokenizer(base.directory)
    disk.require(directory.parent, space_bytes(parts.values(), tokenizer), "preparing these documents")
    for name, part in parts.items():
        counts[name] = _write(name, part, tokenizer, base, directory, cache)
    if data.personal_data:
        texts = (row["text"] for row in parts["corpus"].select_columns(["text"]))
        counts["personal_data"] = personal_data(texts, len(parts["corpus"]))
    return counts


def _read_and_split(
    data: DataSection, base: BaseModel, seed: int, cache: Path, counts: dict[str, Any]
) -> tuple[Dataset, Dataset, list[list[int]]]:
    """(corpus, held-out documents, their clusters of near duplicates): no cluster has members on both sides."""
    limits = ReadLimits(data.on_unreadable, data.file_seconds, data.file_memory_mb)
    reading: dict[str, Any] = {"cache_dir": cache, "hub_revision": data.corpus_revision or None, "limits": limits}
    corpus, account = read_documents(data.corpus, on_first_look=_estimate(base), **reading)
    counts["read"] = account.to_json()
    corpus = _limited(corpus, data.max_documents, seed, counts)
    outside = corpus.select([])
    if data.corpus_heldout:
        outside, account = read_documents(data.corpus_heldout, **reading)
        counts["read_heldout"] = account.to_json()
    total = len(corpus)
    clusters = near_duplicate_clusters([corpus, outside], cache)
    copies = {at for cluster in clusters if cluster[-1] >= total for at in cluster if at < total}
    repeated = (
        {at for cluster in clusters for at in cluster[1:] if at < total} if data.near_duplicates == "drop" else set()
    )
    counts["near_duplicates"] = {
        "clusters": len(clusters),
        "documents": sum(map(len, clusters)),
        "dropped": len(repeated - copies),
        "dropped_because_held_out": len(copies),
        "left_the_corpus": [_name([corpus], at) for at in sorted(copies | repeated)[:LISTED]],
        "largest": [_name([corpus, outside], at) for at in max(clusters, key=len, default=[])[:SHOWN]],
    }
    kept = [at for at in range(total) if at not in copies and at not in repeated]
    if not kept:
        what = "every document of the corpus is a near duplicate of a held-out one"
        raise DataError(Problem(what, list(data.corpus_heldout), "hold other documents out"))
    if data.corpus_heldout:
        return corpus.select(kept), outside, _within(clusters, range(total, total + len(outside)))
    remaining = set(kept)
    order = [at for at in _by_hash(corpus, seed) if at in remaining]
    held = max(2, round(len(order) * data.heldout_share)) if len(order) >= 10 and data.heldout_share else 0
    chosen = sorted(take_whole_clusters(order, clusters, held))
    rest = sorted(remaining - set(chosen))
    return corpus.select(rest), corpus.select(chosen), _within(clusters, chosen)


def _limited(corpus: Dataset, most: int, seed: int, counts: dict[str, Any]) -> Dataset:
    if most:
        counts["beyond_max_documents"] = max(0, len(corpus) - most)
        return corpus.select(sorted(_by_hash(corpus, seed)[:most]))
    return corpus


def _by_hash(documents: Dataset, seed: int) -> list[int]:
    ids = documents["id"][:]
    return sorted(range(len(ids)), key=lambda position: hash_share(ids[position], seed))


def _within(clusters: list[list[int]], chosen: Sequence[int]) -> list[list[int]]:
    """The clusters of chosen documents, by their positions among these."""
    place = {at: number for number, at in enumerate(chosen)}
    return [[place[at] for at in cluster if at in place] for cluster in clusters if any(at in place for at in cluster)]


def _name(parts: Sequence[Dataset], at: int) -> str:
    return parts[0][at]["id"] if at < len(parts[0]) else parts[1][at - len(parts[0])]["id"]


def _write(name: str, part: Dataset, tokenizer: Any, base: BaseModel, directory: Path, cache: Path) -> dict[str, Any]:
    """Tokenise one part of the documents and write it; its counts."""
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
    return {
        "documents": len(tokenised),
        "tokens": _total(tokenised, "num_tokens"),
        "bytes": _total(tokenised, "utf8_bytes"),
        **({"languages": languages(part)} if name == "corpus" else {}),
    }


def _estimate(base: BaseModel) -> Callable[[Look], None]:
    """Says from the first part of the documents how long reading and tokenising all of them will take."""

    def tell(look: Look) -> None:
        tokenizer = load_tokenizer(base.directory)
        began = time.monotonic()
        _tokenise(look.texts, tokenizer)
        times = look.bytes_all / max(1, look.bytes_read)
        tokenising = (time.monotonic() - began) * look.characters / max(1, sum(map(len, look.texts)))
        minutes = times * (look.seconds + tokenising) / 60
        part = f"{look.bytes_read / 1e6:.1f} of {look.bytes_all / 1e6:.1f} MB"
        event(f"a first look at {part}: all of it will take about {minutes:.1f} minutes")

    return tell


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


def _fingerprint(documents: Dataset, tokenizer_digest: str) -> str:
    """What `datasets` writes into state.json: its own is random, and equal data would get other digests each time."""
    digest = hashlib.sha256(tokenizer_digest.encode())
    for rows in documents.select_columns(["id", "text"]).iter(batch_size=200):
        for row in zip(rows["id"], rows["text"], strict=True):
            digest.update(files.canonical_json(row).encode())
    return digest.hexdigest()[:16]


def _tokenise(texts: Sequence[str], tokenizer: Any) -> dict[str, list[Any]]:
    import numpy as np

    # as arrays: `datasets` looks at lists number by number
    ids = [np.array(row, np.int32) for group in _groups(texts) for row in chat.document_ids(tokenizer, group)]
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
