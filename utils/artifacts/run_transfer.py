"""A run with its parents as one file for another machine; every digest is verified on both sides.

The archive is a plain tar (weights do not compress) of `data/...` and `models/...`, whatever the roots are called on
either machine. The base model is not in it: it is named, and the other machine fetches its own.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from utils import disk
from utils.artifacts import files, runs
from utils.artifacts.run_list import CONTROLS, PREPARED, Entry
from utils.exceptions import ArtefactError, Problem, path_fix
from utils.logger import event

DATA, MODELS = "data", "models"
AGAIN = "copy it again, or write it again where the run is: python scripts/runs.py export RUN --runs.archive FILE"


def lineage(entry: Entry, listed: list[Entry]) -> tuple[list[Entry], list[str]]:
    """The run and all that it was made from, and sentences about parents that are not here as runs of ours."""
    by_digest = {one.digest: one for one in listed if one.digest}
    by_directory: dict[Path, Entry] = {}
    absent: list[str] = []
    waiting = [entry]
    while waiting:
        one = waiting.pop()
        by_directory[one.directory] = one
        for parent in one.manifest["parents"]:
            if (known := by_digest.get(parent["digest"])) is None:
                absent.append(f"{one.name} was made from {parent['path']}, which is no run here: it is not carried")
            elif known.directory not in by_directory:
                waiting.append(known)
    return list(by_directory.values()), absent


def export(entry: Entry, listed: list[Entry], archive: Path) -> dict[str, Any]:
    """Write the archive. Raises ArtefactError when the run or a parent is not whole, or the file is there."""
    if not entry.manifest:
        raise ArtefactError(Problem(f"{entry.name} is {entry.state}: only a complete run can go elsewhere"))
    if archive.exists():
        raise ArtefactError(Problem("there is a file of this name", str(archive), "choose another --runs.archive"))
    carried, absent = lineage(entry, listed)
    for one in carried:
        files.verify(one.directory)
    files.make_directory(archive.parent)
    partial = archive.with_name(f".{archive.name}.partial")
    with disk.errors(archive):
        try:
            with tarfile.open(partial, "w") as tar:
                for one in carried:
                    for path in [one.directory / files.MANIFEST, *files.artefact_files(one.directory)]:
                        inside = path.relative_to(one.directory).as_posix()
                        tar.add(path, f"{_place(one.group, one.stage)}/{one.directory.name}/{inside}", recursive=False)
            partial.rename(archive)
        finally:
            partial.unlink(missing_ok=True)
    event("exported", archive=archive, runs=len(carried))
    return {
        "archive": str(archive),
        "size_bytes": archive.stat().st_size,
        "runs": [one.name for one in carried],
        "base": {key: entry.manifest["base"].get(key) for key in ("source", "revision", "digest")},
        "not_carried": absent,
    }


def bring(archive: Path, data_dir: Path, models_dir: Path) -> dict[str, Any]:
    """Unpack an archive. A run that is here already is left alone.

    Raises ArtefactError, with nothing left behind, when a file is not what its manifest says, when a path leads out of
    the place it belongs to, or when another run has the same directory.
    """
    if not archive.is_file():
        raise ArtefactError(Problem("there is no such archive", str(archive), path_fix(archive)))
    scratch = models_dir / ".import.tmp"
    with files.locked(scratch, "the import"), disk.errors(scratch):
        try:
            _unpack(archive, scratch)
            places = _checked(archive, scratch, data_dir, models_dir)
            brought, here = [], []
            for source, target in places.items():
                if target.exists():
                    here.append(str(target))
                else:
                    files.make_directory(target.parent)
                    shutil.move(source, target)
                    brought.append(str(target))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    event("imported", runs=len(brought), already_here=len(here))
    return {"imported": brought, "already_here": here}


def _unpack(archive: Path, scratch: Path) -> None:
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if not member.isfile() or ".." in parts or len(parts) < 4 or parts[0] not in (DATA, MODELS):
                    what = "this is no archive of `runs.py export`: it holds what is no file of a run"
                    raise ArtefactError(Problem(what, member.name))
                tar.extract(member, scratch, filter="data")
            end = tar.offset
        with archive.open("rb") as file:
            file.seek(end)
            if file.read(512) != bytes(512):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"a damaged header at byte {end}")
    except (OSError, tarfile.TarError) as error:
        raise ArtefactError(Problem(f"the archive cannot be read: {error}", str(archive), AGAIN)) from error


def _checked(archive: Path, scratch: Path, data_dir: Path, models_dir: Path) -> dict[Path, Path]:
    """Unpacked directory -> where it belongs, after everything was verified."""
    targets, problems = {}, []
    for manifest_path in sorted(scratch.glob(f"*/**/{files.MANIFEST}")):
        source = manifest_path.parent
        top, *place = source.relative_to(scratch).parts
        target = (data_dir if top == DATA else models_dir).joinpath(*place)
        targets[source] = target
        try:
            manifest = files.verify(source)
        except ArtefactError as error:
            # the paths are those inside the archive: what was unpacked is removed
            damaged = (one.what.replace(f"{scratch}/", "") for one in error.problems)
            problems += [Problem(f"the archive is damaged: {what}", str(archive), AGAIN) for what in damaged]
            continue
        kind, group = str(manifest.get("kind")), CONTROLS if place[0] == CONTROLS.rstrip("/") else ""
        if kind not in runs.STAGES or f"{_place(group, kind)}/{source.name}" != "/".join((top, *place)):
            problems.append(Problem(f"this is a {kind} run in a place where none belongs", "/".join((top, *place))))
        elif target.exists() and _digest(target) != manifest["digest"]:
            problems.append(Problem(f"another run is called {target}", fix="move or remove that one"))
    if not targets:
        problems.append(Problem("the archive holds no run"))
    if problems:
        raise ArtefactError(problems)
    return targets


def _digest(directory: Path) -> str:
    try:
        return str(files.read_manifest(directory)["digest"])
    except ArtefactError:
        return ""


def _place(group: str, stage: str) -> str:
    return f"{DATA if stage == PREPARED else MODELS}/{group}{stage}"
