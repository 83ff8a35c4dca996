"""Run directories: where each stage writes, how a run is found again, and how parents are chosen.

    data/prepared/<run>/     models/base/<name>/        models/domain/<run>/     models/task/<run>/
    models/composed/<run>/   models/evaluation/<run>/   models/benchmark/<run>/

A run is known by its identity (`identity.py`), whatever its directory is called, so the same command finds the same run
again: complete, it is reused; incomplete, it goes on from its last checkpoint. A new one is named after the preset and
the first 8 digits of the identity's fingerprint.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import disk, flags, logger
from utils.artifacts import files, locks, manifests
from utils.artifacts.identity import MARK, Identity
from utils.exceptions import ArtefactError, PipelineError, Problem
from utils.logger import event, warning

FORMAT_VERSION = 1
LATEST = ".latest.json"
IDENTITY = "identity.json"
METRICS = "metrics.jsonl"
LOG = "run.log"
# what lies in a run in which nothing was made yet
NOTHING_DONE = {IDENTITY, LOG, locks.LOCK}
REFUSED = 2
STAGES = {
    "prepared": "python scripts/prepare_data.py",
    "domain": "accelerate launch --config_file scripts/launch/one_gpu.yaml scripts/train_domain_adapter.py",
    "task": "accelerate launch --config_file scripts/launch/one_gpu.yaml scripts/train_task_adapter.py",
    "composed": "python scripts/compose.py",
    "evaluation": "python scripts/evaluate.py",
    "benchmark": "python scripts/benchmark.py",
}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "numpy")


@dataclass(frozen=True)
class Run:
    """A complete artefact: its directory and its manifest."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def adapter(self) -> Path:
        """The folder in PEFT's format: ours keep it in adapter/, a folder of another tool is one itself."""
        return self.directory / self.manifest.get("adapter", "adapter")

    def as_parent(self) -> dict[str, str]:
        """What a child records about it."""
        seal = {key: self.manifest[key] for key in (manifests.SEAL,) if key in self.manifest}
        return {"kind": self.manifest["kind"], "path": str(self.directory), "digest": self.digest, **seal}


def directory_for(root: Path, stage: str, name: str, preset: str, identity: Identity) -> Path:
    """The directory of the run with this identity, complete or begun, else of a new one; `name` is `--run.name`."""
    if name:
        return root / stage / name
    usual = root / stage / f"{preset}-{identity.fingerprint[:8]}"
    if usual.exists():
        return usual
    known = [path for path, recorded in _recorded(root / stage) if identity.is_of(recorded)]
    # a complete one before one that was begun
    return min(known, key=lambda path: not (path / files.MANIFEST).exists(), default=usual)


def open_run(directory: Path, identity: Identity) -> Run | None:
    """The complete run in `directory`, or None when it is still to be made.

    Raises ArtefactError when the directory holds a run with other settings, so nothing is ever overwritten.
    """
    if not directory.exists():
        return None
    if (directory / files.MANIFEST).exists():
        run = checked(directory, files.verify(directory))
        _refuse_other(directory, run.manifest["identity"], identity)
        return run
    started = directory / IDENTITY
    if started.exists():
        _refuse_other(directory, files.read_json(started), identity)
    return None


def make(directory: Path, identity: Identity, what: str, fill: Callable[[], dict[str, Any]]) -> tuple[Run, bool]:
    """The complete run in `directory` and whether it was there already; else `fill` makes it, under its lock.

    `fill()` writes into the directory, goes on from what an interrupted call left there, and returns the manifest. Its
    events are kept in run.log. Raises ArtefactError when the directory holds other settings, another process has it
    (`what` says of what), or the disk refuses something.
    """
    if (run := open_run(directory, identity)) is not None:
        return run, True
    with files.locked(directory, what), disk.errors(directory):
        if (run := open_run(directory, identity)) is not None:  # whoever held the lock may have finished it
            return run, True
        with begun(directory, identity):  # closed before the manifest takes the digest of the log
            facts = fill()
        return Run(directory, files.seal(directory, facts)), False


@contextmanager
def begun(directory: Path, identity: Identity) -> Iterator[None]:
    """Inside, the run (its lock is held) is begun, and events go to its log; refused with nothing done it is gone."""
    try:
        with logger.to_file(directory / LOG):
            start(directory, identity)
            yield
    except PipelineError as error:
        if error.exit_code == REFUSED and {path.name for path in directory.iterdir()} <= NOTHING_DONE:
            shutil.rmtree(directory, ignore_errors=True)
        raise


def start(directory: Path, identity: Identity) -> None:
    """Write down what the directory (its lock is held) is going to hold, so that a resume can refuse other settings.

    Raises ArtefactError when another process finished it, or started it with other settings, before the lock was free.
    """
    if open_run(directory, identity) is not None:
        raise ArtefactError(Problem(f"{directory} was finished by another process", fix="run the same command again"))
    is_begun = (directory / IDENTITY).exists()
    if not is_begun:
        _mention_others(directory, identity)
    files.make_directory(directory)
    locks.sweep(directory, held=True)
    if not is_begun:  # its checkpoints name what is recorded, in the form of the version that began the run
        files.write_json(directory / IDENTITY, identity.values)


def manifest(
    kind: str,
    identity: Identity,
    *,
    base: dict[str, Any],
    parents: list[Run],
    measured: dict[str, Any],
    **facts: Any,
) -> dict[str, Any]:
    """The facts every artefact records: what it is, from what, made how, with which versions."""
    return {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "created_ns": time.time_ns(),
        "fingerprint": identity.fingerprint,
        "identity": identity.values,
        "base": base,
        "parents": [parent.as_parent() for parent in parents],
        "versions": versions(),
        "command": flags.command(),
        "measured": measured,
        **facts,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    by_package = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return by_package


def complete_runs(root: Path, stage: str) -> list[Run]:
    """Every complete run of a stage: first the one made or asked for last, then by age, newest first.

    One whose manifest cannot be read is passed over with a warning: it must not stand in the way of the others.
    """
    sealed_runs = []
    for path in (root / stage).glob(f"*/{files.MANIFEST}"):
        if not path.parent.name.startswith("."):
            try:
                sealed_runs.append(checked(path.parent, files.read_manifest(path.parent)))
            except ArtefactError as error:
                warning("a run with an unreadable manifest is passed over", reason=error.problems[0].what)
    latest = _latest(root, stage)
    return sorted(
        sealed_runs, key=lambda run: (run.directory.name == latest, run.manifest.get("created_ns", 0)), reverse=True
    )


def parent(
    root: Path, stage: str, pinned: str, fits: Callable[[Run], str], *, flag: str, hint: str = "", quiet: bool = False
) -> Run:
    """The parent run: the pinned one, or the newest complete one that fits; says which.

    `fits(run)` returns an empty string, or the reason why the run cannot be used. Raises ArtefactError with the reason
    for each run that was looked at.
    """
    make = f"make one with: {STAGES[stage]}{hint}"
    if pinned:
        directory = Path(pinned)
        if not (directory / files.MANIFEST).exists():
            raise ArtefactError(Problem(f"{flag}: no complete {stage} run there", pinned, make))
        run = checked(directory, files.verify(directory))
        kind = run.manifest.get("kind")
        reason = f"it is a {kind} run" if kind != stage else fits(run)
        if reason:
            fix = f"give it as --{kind}_adapter" if kind != stage and kind in ("domain", "task") else make
            raise ArtefactError(Problem(f"{flag} cannot be used: {reason}", pinned, fix))
        return run
    looked_at = []
    for run in complete_runs(root, stage):
        reason = fits(run)
        if not reason:
            files.verify(run.directory)
            if not quiet:
                event(f"using the newest complete {stage} run", path=run.directory)
            return run
        what, way, rest = reason.partition("to use it, ")
        looked_at.append(Problem(f"{run.directory}: {what.rstrip('; ')}", fix=way + rest))
    missing = Problem(f"no complete {stage} run that fits under {root / stage}", fix=make)
    raise ArtefactError([*looked_at[:5], missing])


def mark_latest(root: Path, stage: str, directory: Path) -> None:
    """Remember the run that was made or asked for last: later stages take it when nothing pins another."""
    locks.sweep(root / stage)
    files.write_json(root / stage / LATEST, {"run": directory.name})


def checked(directory: Path, manifest: dict[str, Any]) -> Run:
    """The run with this manifest. Raises ArtefactError when it lacks what a run of its kind says."""
    if missing := manifests.missing(manifest):
        what = f"{directory / files.MANIFEST} is not a manifest of this version"
        fix = "restore it, or remove the directory and make it anew"
        raise ArtefactError([Problem(f"{what}: {reason}", fix=fix) for reason in missing[:5]])
    return Run(directory, manifest)


def _latest(root: Path, stage: str) -> str:
    """The name in the pointer; a damaged pointer points nowhere, which is what a missing one does."""
    with suppress(ArtefactError):
        pointer = files.read_json(root / stage / LATEST)
        return str(pointer.get("run", "")) if isinstance(pointer, dict) else ""
    return ""


def _recorded(stage: Path) -> Iterator[tuple[Path, Any]]:
    """Directory and recorded identity of each run of a stage, complete or begun; what cannot be read is passed over."""
    for path in sorted(stage.glob("*")):
        with suppress(ArtefactError):
            if (path / files.MANIFEST).exists():
                yield path, files.read_manifest(path).get("identity")
            elif (path / IDENTITY).exists():
                yield path, files.read_json(path / IDENTITY)


def _mention_others(directory: Path, identity: Identity) -> None:
    """Say why this run starts from nothing although one is there that is nearly it."""
    unfinished = []
    for path, recorded in _recorded(directory.parent):
        changed = identity.differences(recorded)
        if changed and all(one.startswith(f"{MARK} was") for one in changed):
            what = "made anew: since this run was made, the same settings give another result"
            event(what, kept=path, changed="; ".join(changed))
        elif changed and not (path / files.MANIFEST).exists():
            unfinished.append((changed, path))
    if unfinished:
        changed, kept = min(unfinished, key=lambda entry: len(entry[0]))
        event(
            "starting anew: the unfinished run that is most like this one has other settings and is kept",
            unfinished=kept,
            changed="; ".join(changed[:4]),
        )


def _refuse_other(directory: Path, recorded: Any, identity: Identity) -> None:
    if changed := identity.differences(recorded):
        raise ArtefactError(
            Problem(
                f"{directory} holds a run with other settings: {'; '.join(changed[:8])}",
                fix="give this run its own --run.name, or remove that directory to start anew",
            )
        )
