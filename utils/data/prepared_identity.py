"""What decides prepared data: the contents of its sources, how they are split, the tokenizer and the seed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from config import BUILT_IN_TASKS, DataSection
from utils.artifacts import files
from utils.artifacts.identity import Identity, chosen, same_names
from utils.data.domains.built_in import BuiltIn
from utils.data.prepared import NONE, built_in_domain
from utils.models.base_model import BaseModel

SOURCES = {
    "corpus": "corpus_revision",
    "corpus_heldout": "corpus_revision",
    "task": "task_revision",
    "task_dev": "task_revision",
    "task_test": "task_revision",
}
LIMITS = same_names("max_documents", "max_train_examples", "max_dev_examples", "max_test_examples")
INVENTED = same_names("invented_towns", "invented_attributes")
# raised when the same files give other documents; 2: nothing is deleted unsaid, see `data.extraction`; 3: columns of a
# PDF that stand close, parts of pages that unfold, encodings by other names; 4: mailboxes, subtitles, OpenDocument
# texts, code of pages that stands line by line in a table; 5: forwarded messages, charts, Sphinx, LaTeX macros of a
# file, letters and numbers of lists (all 2026-11-30)
READING_METHOD = 5
# what one file may take decides which files are read
READING = same_names("file_seconds", "file_memory_mb", "near_duplicates", "personal_data")
# raised when the same labelled rows are read otherwise than before: pairs that were read the old way are read anew
PAIRS_METHOD = 4
SHARES = same_names("heldout_share", "dev_share", "test_share")


def identity(data: DataSection, base: BaseModel, seed: int) -> Identity:
    """The identity of what these settings prepare. Reads and digests every local source."""
    domain = built_in_domain(data, seed)
    contents = {name: [_content(source, domain) for source in _listed(getattr(data, name))] for name in SOURCES}
    values = _values(data.model_dump(mode="json"), contents, base.tokenizer_digest, seed)
    return Identity.of("prepared", values, _earlier)


def _values(
    data: Mapping[str, Any],
    contents: Mapping[str, Any],
    tokenizer: str,
    seed: int,
    method: int = READING_METHOD,
) -> dict[str, Any]:
    """The deciding values of a settings section and the contents of its sources."""
    sources = {name: _sources(data[name], contents.get(name), data.get(SOURCES[name])) for name in SOURCES}
    names = {source for name in ("corpus", "task") for source in _listed(data[name])}
    shares = {**SHARES}
    # a share decides nothing where a person gives the split
    if data["corpus_heldout"] or names & set(BUILT_IN_TASKS):
        del shares["heldout_share"]
    for split in ("dev", "test"):
        if data[f"task_{split}"] or data["task"] in ("python_docs", NONE):
            del shares[f"{split}_share"]
    return {
        "sources": {name: values for name, values in sources.items() if values},
        "split": chosen(data, shares),
        "limits": chosen(data, LIMITS),
        # a file of pairs is read by rules of our own, which are not those of before 2026-11-30
        **({"columns": list(data.get("columns") or ()), "reading": PAIRS_METHOD} if _is_read(data["task"]) else {}),
        **({"invented": chosen(data, INVENTED)} if any(name.startswith("invented") for name in names) else {}),
        **_reading(data, method),
        "tokenizer": tokenizer,
        "seed": seed,
    }


def _reading(data: Mapping[str, Any], method: int) -> dict[str, Any]:
    """How documents are read, where files are read and not a built-in domain: of that, only whether it was counted."""
    named = {*_listed(data["corpus"]), *_listed(data["corpus_heldout"])} - {NONE}
    if named - set(BUILT_IN_TASKS) and method > 1:
        return {"documents": {"method": method, **chosen(data, READING)}}
    # left out where nothing was counted, which is what prepared data of before have
    return {"documents": {"personal_data": True}} if named and data.get("personal_data") else {}


def _is_read(task: str) -> bool:
    """Whether labelled pairs are read from files or a hub, and do not come with the program."""
    return task != NONE and task not in BUILT_IN_TASKS


def _earlier(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Manifests of before 2026-11-30 have the whole section and the contents of its sources."""
    values = _values(recorded["data"], recorded["sources"], recorded["tokenizer"], recorded["seed"], method=1)
    return values | ({"reading": 1} if "reading" in values else {})


def _sources(named: str | Sequence[str], contents: Sequence[Mapping[str, Any]] | None, revision: Any) -> list[Any]:
    """Each source by its contents; a file by its name too, which its documents are called by; a hub's by commit."""
    sources = []
    for name, content in zip(_listed(named), contents or (), strict=True):
        if "sha256" in content:
            called = {"name": Path(name).name} if Path(name).suffix else {}
            sources.append(called | content)
        else:
            sources.append({"name": name, "revision": revision or ""} if name != NONE else {"name": NONE})
    return sources


def _listed(value: str | Sequence[str]) -> list[str]:
    return ([value] if value else []) if isinstance(value, str) else list(value)


def _content(source: str, domain: BuiltIn | None) -> dict[str, str]:
    """What identifies the contents of a source: the digest of a local file or folder, or of the built-in domain."""
    path = Path(source).expanduser()
    if domain and source in BUILT_IN_TASKS:
        # the texts and not a version: what a Python documents depends on its platform and on how it was built
        return {"sha256": files.fingerprint([domain.documents, domain.heldout, domain.examples])}
    if path.is_file():
        return {"sha256": files.sha256_file(path)}
    if path.is_dir():
        # links are followed, as they are when the folder is read
        walked = ((Path(root), names) for root, _, names in os.walk(path, followlinks=True))
        inside = sorted(root / name for root, names in walked for name in names if not name.startswith("."))
        return {"sha256": files.fingerprint({str(p.relative_to(path)): files.sha256_file(p) for p in inside})}
    return {"name": source}
