"""What a manifest has to hold before anyone relies on it: values of JSON in, sentences out.

A manifest is only as good as the one who wrote it. Its `digest` is over the contents of the files, its `seal` over the
manifest itself, so an edit by hand is seen; a forger can compute both anew, and is found by what others recorded about
the artefact: its children hold its digest and its seal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

SEAL = "seal"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# what is read from manifests of each kind, by everything that reads them
_RUN = {"identity": dict, "fingerprint": str, "base.digest": str, "base.source": str, "parents": list, "versions": dict}
_TRAINED = {**_RUN, "measured": dict}
NEEDED: dict[str, dict[str, type]] = {
    "checkpoint": {"step": int},
    "base": {"source": str},
    "prepared": {**_RUN, "identity.tokenizer": str, "counts": dict},
    "domain": _TRAINED,
    "task": {**_TRAINED, "identity.on": str, "system_prompt": str},
    "composed": {
        **_RUN,
        "identity.base": str,
        "identity.adapters": list,
        "composition.recipe": dict,
        "composition.recipe.weights": list,
        "composition.searched": bool,
        "composition.exact": bool,
        "measured": dict,
        "system_prompt": str,
    },
    "merged": {**_RUN, "measured": dict},
    "evaluation": _RUN,
    "benchmark": _RUN,
}


def problems(manifest: Any) -> list[str]:
    """Why this is no manifest of any artefact, in words; empty when it is one."""
    if not isinstance(manifest, dict):
        return [f"it is a {type(manifest).__name__}, not an object"]
    files = manifest.get("files")
    if not isinstance(files, dict):
        return ["it lists no files"]
    reasons = [
        f"its entry for {name!r} is not a sha256 and a number of bytes" for name in files if not _is_file(files[name])
    ]
    reasons += [f"the name {name!r} leads out of its directory" for name in files if not _is_inside(name)]
    if not _is_digest(manifest.get("digest")):
        reasons.append("it has no digest")
    parents = manifest.get("parents", [])
    if not isinstance(parents, list) or not all(
        isinstance(p, dict) and all(isinstance(p.get(k), str) for k in ("kind", "path", "digest")) for p in parents
    ):
        reasons.append("a parent is not a kind, a path and a digest")
    return reasons


def missing(manifest: Mapping[str, Any]) -> list[str]:
    """What readers of this kind of artefact would not find in its manifest, in words."""
    reasons = []
    for path, kind in NEEDED.get(str(manifest.get("kind")), {}).items():
        value = _at(manifest, path)
        if not isinstance(value, kind):
            reasons.append(f"{path} is missing, or is not what belongs there")
    return reasons


def seal(manifest: Mapping[str, Any], fingerprint: Callable[[Any], str]) -> str:
    """Digest of everything else in the manifest, as it is on the disk."""
    on_disk = json.loads(json.dumps(dict(manifest), default=str))
    return fingerprint({key: value for key, value in on_disk.items() if key != SEAL})


def was_edited(manifest: Mapping[str, Any], fingerprint: Callable[[Any], str]) -> bool:
    """Whether digest or seal are not those of what it says; manifests of earlier versions have no seal."""
    digest = fingerprint({name: entry["sha256"] for name, entry in manifest["files"].items()})
    return digest != manifest["digest"] or manifest.get(SEAL) not in (None, seal(manifest, fingerprint))


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_file(entry: Any) -> bool:
    is_size = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and not isinstance(entry["bytes"], bool)
    return is_size and _is_digest(entry.get("sha256"))


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
