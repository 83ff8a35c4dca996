"""Files on disk: atomic writes, digests, and the publish protocol of every artefact.

An artefact is a directory with a `manifest.json` that names the sha256 and size of each of its files. The manifest is
written last, atomically, after everything else is on the disk: it exists if and only if the artefact is complete, and
readers take nothing without it. There are two ways to one:

* `publish` fills a hidden sibling and renames it into place: prepared data, checkpoints, base and merged models.
* a run directory is filled in place under its lock and then `seal`ed, because what is in it is what a killed run goes
  on from (checkpoints, scored cells, measured points) and what a person watches (run.log): training, composing,
  evaluating, benchmarks. Nobody writes into a sealed one: `runs.start` looks again once it has the lock.

A killed process leaves its lock free, and beside its target `.NAME.tmp/` (rubbish, removed by the next `publish`),
`.NAME.partial-*/` (kept: the same command goes on from it) or `.NAME.tmp-PID@HOST` (small, removed by `locks.sweep`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils import disk
from utils.artifacts import locks, manifests
from utils.artifacts.locks import LOCK, locked
from utils.disk import make_directory
from utils.exceptions import ArtefactError, Problem

MANIFEST = "manifest.json"
# what a run directory holds only while it is being made: no part of the artefact
SCRATCH = "checkpoints"
_BLOCK = 1 << 22


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, so it can be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def fingerprint(value: Any) -> str:
    """Hex sha256 of a JSON-like value; half of a surrogate pair, which JSON can hold and UTF-8 cannot, is one, too."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new, never a mixture."""
    temporary = locks.small_file(path)
    with disk.errors(path):
        try:
            with temporary.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # below a regular file even the removal fails
                temporary.unlink()
            raise
        _fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def regular_bytes(path: Path) -> bytes:
    """What a regular file holds. Raises OSError, also for pipes and devices, which could be read for ever."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as handle:
        if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return handle.read()


def read_json(path: Path) -> Any:
    """Raises ArtefactError naming the file when it is missing or is not JSON."""
    try:
        return json.loads(regular_bytes(path).decode("utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(Problem(f"{path} does not exist")) from error
    except OSError as error:
        raise ArtefactError(Problem(f"cannot read {path}: {error.strerror or error}")) from error
    except (ValueError, RecursionError) as error:  # also of numbers of 5,000 digits, and of 100,000 brackets
        raise ArtefactError(
            Problem(f"{path} is not valid JSON ({error})", fix="restore it or make the run anew")
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that has to be an object. Raises ArtefactError naming the file when it is none."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ArtefactError(Problem(f"{path} is a {type(value).__name__}, not a JSON object", fix="restore it"))
    return value


@contextmanager
def publish(
    target: Path,
    manifest: Callable[[], dict[str, Any]],
    *,
    resume: str = "",
    digests: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """Yield a temporary sibling of `target` to fill; on success write its manifest last and rename it into place.

    `manifest()` is called after the body, so it may hold what the body measured. Replaces nothing: `target` must not
    exist, or be empty. On any error the temporary directory is removed and `target` is as it was. With `resume` (a
    fingerprint of what is being made) it is kept instead, and the same call finds it again with what was in it.
    `digests` (file name -> sha256, filled by the body) saves reading large files again. A second process that makes
    the same is refused; what a killed one left is removed.
    """
    _refuse_taken(target)
    temporary = target.with_name(f".{target.name}.{f'partial-{resume[:12]}' if resume else 'tmp'}")
    with disk.errors(target):
        make_directory(target.parent)
        with locked(temporary, "the output"):
            _refuse_taken(target)  # whoever held the lock may have finished it
            if not resume:
                _empty(temporary)
            try:
                yield temporary
                seal(temporary, manifest(), digests)
                temporary.rename(target)
            except BaseException:
                if not resume:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise
            # only now: without it another process could lock the directory just before it is renamed
            (target / LOCK).unlink(missing_ok=True)
            _fsync_directory(target.parent)
        for other in target.parent.glob(f".{_escaped(target.name)}.partial-*"):
            locks.remove_if_free(other)  # made with other settings: it can no longer become `target`


def seal(directory: Path, manifest: dict[str, Any], digests: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Fsync every file, give all the permissions that umask allows, and write the manifest last. Returns it."""
    known = digests or {}
    files: dict[str, dict[str, Any]] = {}
    for path in artefact_files(directory):
        with disk.errors(path):
            # safetensors writes mode 0600 (safetensors#782), which hides a published model from another user's server
            path.chmod(0o666 & ~current_umask() | stat.S_IRUSR | stat.S_IWUSR)
            _fsync_file(path)
        name = path.relative_to(directory).as_posix()
        files[name] = {"sha256": known.get(name) or sha256_file(path), "bytes": path.stat().st_size}
    complete = {**manifest, "digest": fingerprint({name: f["sha256"] for name, f in files.items()}), "files": files}
    complete[manifests.SEAL] = manifests.seal(complete, fingerprint)
    for inside in {parent for path in artefact_files(directory) for parent in path.relative_to(directory).parents}:
        _fsync_directory(directory / inside)
    write_json(directory / MANIFEST, complete)
    _fsync_directory(directory.parent)
    return complete


def artefact_files(directory: Path) -> list[Path]:
    """Files that a manifest covers: not itself, no checkpoints, nothing hidden, nothing that Python cached there."""
    outside = (directory / MANIFEST, directory / SCRATCH)
    paths = (p for p in sorted(directory.rglob("*")) if p.is_file() and not {p, *p.parents}.intersection(outside))
    return [
        p
        for p in paths
        if not any(part.startswith(".") or part == "__pycache__" for part in p.relative_to(directory).parts)
    ]


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest as it stands, without looking at the files. Raises ArtefactError when it is none."""
    manifest = read_json(directory / MANIFEST)
    if reasons := manifests.problems(manifest):
        what = f"{directory / MANIFEST} is not a manifest of this version"
        raise ArtefactError(
            [Problem(f"{what}: {reason}", fix="restore it, or remove the directory") for reason in reasons[:5]]
        )
    return manifest


def verify(directory: Path, *, hash_files: bool = True) -> dict[str, Any]:
    """The manifest of a complete artefact, checked against its files: these and no others.

    With `hash_files=False` only presence and size are checked. Raises ArtefactError naming each file that differs.
    """
    manifest = read_manifest(directory)
    problems: list[Problem] = []
    root = directory.resolve()
    if manifests.was_edited(manifest, fingerprint):
        problems.append(Problem(f"{directory / MANIFEST} was edited after it was written"))
    for path in artefact_files(directory):
        if path.relative_to(directory).as_posix() not in manifest["files"]:
            # a loader takes what it finds: adapter_config.json beside merged weights is an adapter applied twice
            problems.append(Problem(f"{path} is no part of the artefact: it was added later", fix="move it elsewhere"))
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.resolve().is_relative_to(root):
            problems.append(Problem(f"{path} leads out of {directory}", name))
        elif not path.is_file():
            problems.append(Problem(f"{path} is missing"))
        elif path.stat().st_size != expected["bytes"]:
            problems.append(Problem(f"{path} has {path.stat().st_size} bytes, its manifest says {expected['bytes']}"))
        elif hash_files and sha256_file(path) != expected["sha256"]:
            problems.append(Problem(f"{path} was changed after it was written (its sha256 differs from the manifest)"))
    if problems:
        last = problems.pop()
        problems.append(
            Problem(
                last.what, last.value, last.fix or f"restore {directory} from a copy, or remove it and make it anew"
            )
        )
        raise ArtefactError(problems)
    return manifest


def current_umask() -> int:
    """The process's umask (reading it means setting it for a moment)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _refuse_taken(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtefactError(
            Problem(
                "the output already exists and is not empty", str(target), "choose another path, or remove it first"
            )
        )


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _fsync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
