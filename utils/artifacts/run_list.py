"""What runs there are: stage, base, data, settings that differ, results, size, age, parents and children.

Reads manifests and writes nothing. A run that cannot be read is in the list all the same, with the reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.artifacts import files, runs
from utils.exceptions import ArtefactError, ConfigError, Problem, did_you_mean

PREPARED = "prepared"
CONTROLS = "controls/"
# from the best on; what an evaluation says of a composition
VERDICTS = ("helps", "coexists", "undecided", "interferes", "hurts")


@dataclass
class Entry:
    """One run's directory. `manifest` is empty where the run is unfinished or cannot be read (`problem` says why).

    `group` is "" for a person's own runs, "controls/" for those that an evaluation made for its comparisons.
    """

    group: str
    stage: str
    directory: Path
    manifest: Mapping[str, Any]
    settings: dict[str, Any]
    size_bytes: int
    changed_at: float
    problem: str = ""
    children: list[Entry] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`stage/directory`, which every command accepts."""
        return f"{self.group}{self.stage}/{self.directory.name}"

    @property
    def digest(self) -> str:
        return str(self.manifest.get("digest", ""))

    @property
    def state(self) -> str:
        return "complete" if self.manifest else self.problem or "unfinished"

    @property
    def base(self) -> str:
        return str(self.manifest.get("base", {}).get("source", ""))

    @property
    def data(self) -> str:
        """Directory name of the prepared data it was made from."""
        parents = self.manifest.get("parents", [])
        return next((Path(p["path"]).name for p in parents if p["kind"] == PREPARED), "")

    @property
    def dev_loss(self) -> float | None:
        """Nats per token on dev; comparable only between runs of one stage, base and data."""
        return self.manifest.get("measured", {}).get("best_dev_loss")

    @property
    def verdict(self) -> str:
        """The word of this evaluation; of a composition that of the newest evaluation it took part in."""
        if self.stage == "evaluation" and self.manifest:
            try:
                return str(files.read_object(self.directory / "results.json").get("verdict", ""))
            except ArtefactError:
                return ""
        if self.stage != "composed":
            return ""
        judging = self.judging
        return judging.verdict if judging else ""

    @property
    def judging(self) -> Entry | None:
        """The newest evaluation of this composition alone; a matrix judges each of its pairs, and has no verdict."""
        judged = [child for child in self.children if child.stage == "evaluation" and child.verdict]
        return max(judged, key=lambda child: child.changed_at, default=None)

    def to_json(self) -> dict[str, Any]:
        """What one line of JSON says of it."""
        return {
            "name": self.name,
            "path": str(self.directory),
            "state": self.state,
            "base": self.base,
            "data": self.data,
            "dev_loss": self.dev_loss,
            "verdict": self.verdict,
            "size_bytes": self.size_bytes,
            "age_days": round((time.time() - self.changed_at) / 86_400, 2),
            "created_at": self.manifest.get("created_at", ""),
            "digest": self.digest,
            "children": [child.name for child in self.children],
        }


def entries(data_dir: Path, models_dir: Path) -> list[Entry]:
    """Every run, by stage in the order of the pipeline, the newest first, with its children."""
    listed = []
    for group in ("", CONTROLS):
        for stage in runs.STAGES:
            root = (data_dir if stage == PREPARED else models_dir) / group
            listed += sorted(_of_stage(root, group, stage), key=lambda entry: entry.changed_at, reverse=True)
    by_digest = {entry.digest: entry for entry in listed if entry.digest}
    for entry in listed:
        for parent in entry.manifest.get("parents", []):
            if (known := by_digest.get(parent["digest"])) is not None:
                known.children.append(entry)
    return listed


def descendants(entry: Entry) -> list[Entry]:
    """Children, their children and so on, each once."""
    by_directory: dict[Path, Entry] = {}
    waiting = list(entry.children)
    while waiting:
        one = waiting.pop(0)
        if one.directory not in by_directory:
            by_directory[one.directory] = one
            waiting += one.children
    return list(by_directory.values())


def named(listed: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """The runs of these names: `stage/directory`, a path, or a directory's name alone where only one has it.

    Raises ConfigError with every name that is none or fits several.
    """
    matches, problems = [], []
    for name in names:
        path = Path(name).resolve()
        fits = [e for e in listed if e.directory.resolve() in (path, path.parent if path.name == "adapter" else path)]
        fits = fits or [e for e in listed if name == e.name]
        fits = fits or [e for e in listed if name == e.directory.name]
        if len(fits) == 1:
            matches.append(fits[0])
        elif fits:
            problems.append(Problem("several runs have this name", name, "say " + " or ".join(e.name for e in fits)))
        else:
            hint = did_you_mean(name, [*(e.name for e in listed), *(e.directory.name for e in listed)])
            problems.append(Problem("there is no such run", name, hint or "see `python scripts/runs.py list`"))
    if problems:
        raise ConfigError(problems)
    return list({entry.directory: entry for entry in matches}.values())


def best(listed: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """The best run of each stage, base and data with the reason: lowest dev loss, or the best verdict."""
    chosen: dict[tuple[str, ...], tuple[Any, Entry, str]] = {}
    for entry in listed:
        rank: Any
        if entry.dev_loss is not None and math.isfinite(entry.dev_loss):
            rank, why = entry.dev_loss, f"dev loss {entry.dev_loss:.4f} nats per token"
            # a control on the base is another thing than a stacked adapter
            key = (entry.stage, entry.base, entry.data, str(entry.settings.get("on", "")))
        elif entry.verdict in VERDICTS:
            gain, unit, alone = _gain(entry)
            text = "gain not measured" if gain is None else f"gain {gain:+.3f} {unit}"
            rank, why = (VERDICTS.index(entry.verdict), math.inf if gain is None else -gain), f"{entry.verdict}, {text}"
            # gains in two metrics, or of one adapter and of a composition, do not compare
            key = (entry.stage, entry.base, entry.data, unit, alone)
        else:
            continue
        if key not in chosen or rank < chosen[key][0]:
            chosen[key] = (rank, entry, why)
    return [(entry, why) for _, entry, why in chosen.values()]


def size(directory: Path) -> int:
    """Bytes of all files below, links not followed."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file() or path.is_symlink())


def _of_stage(root: Path, group: str, stage: str) -> Iterator[Entry]:
    for directory in sorted((root / stage).glob("*")):
        if not directory.is_dir() or directory.is_symlink() or directory.name.startswith("."):
            continue
        manifest, settings, problem = {}, {}, ""
        marks = [directory / name for name in (files.MANIFEST, runs.IDENTITY) if (directory / name).exists()]
        if not marks:
            continue  # nothing of ours
        try:
            if marks[0].name == files.MANIFEST:
                manifest = runs.checked(directory, files.read_manifest(directory)).manifest
                settings = dict(manifest["identity"])
            else:
                settings = dict(files.read_object(marks[0]))
        except ArtefactError as error:
            problem = f"unreadable: {error.problems[0].what}"
        yield Entry(group, stage, directory, manifest, settings, size(directory), _last_change(directory), problem)


def _last_change(directory: Path) -> float:
    return max((path.lstat().st_mtime for path in [directory, *directory.rglob("*")]), default=0.0)


def _gain(entry: Entry) -> tuple[float | None, str, str]:
    """(gain of the evaluation, in what it is counted, the adapter that was judged alone): H3, what composing gained
    over the task adapter alone; of one adapter what it gained over the base model. None where it was not measured."""
    of = entry if entry.stage == "evaluation" else entry.judging or entry
    results = files.read_object(of.directory / "results.json")
    contrasts = results.get("contrasts", {})
    gain = next((contrasts[name] for name in ("H3", "T1", "D1") if name in contrasts), {}).get("estimate")
    unit = str((results.get("primary") or {}).get("unit", "nats per token"))
    return float(gain) if isinstance(gain, (int, float)) else None, unit, str(results.get("alone", ""))
