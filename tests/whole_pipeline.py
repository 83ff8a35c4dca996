"""The toy pipeline to its end, built once: what the tests of trust copy, damage and look at. No tests here."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.support import Workspace, last_json, temporary_directory
from tests.test_system_pipeline import built

BASE = "models/base/tiny-minimax-m2"


@dataclass(frozen=True)
class Whole:
    """Where everything is, relative to `root`; a copy has the same names below another root."""

    root: Path
    prepared: str
    domain: str
    task: str
    baseline: str
    composed: str
    evaluation: str
    merged: str = "models/merged"
    base: str = BASE

    def __getitem__(self, name: str) -> Path:
        return self.root / str(getattr(self, name))

    @property
    def roots(self) -> tuple[Path, Path]:
        return self.root / "data", self.root / "models"

    @property
    def flags(self) -> list[str]:
        """Places, and the runs that belong together."""
        places = ["--run.data_dir", str(self.roots[0]), "--run.models_dir", str(self.roots[1])]
        return [*places, "--domain_adapter", str(self["domain"]), "--task_adapter", str(self["task"])]

    def copy(self) -> Whole:
        """A copy that may be damaged."""
        root = temporary_directory() / "copy"
        shutil.copytree(self.root, root)
        return Whole(**{**vars(self), "root": root})


@functools.cache
def whole() -> tuple[Whole, Workspace]:
    """Data, adapters, their composition, an evaluation and a merged model; and the workspace that made them."""
    started, reported = built()
    place = Workspace()
    for name in ("data", "models/base", "models/domain", "models/task"):
        shutil.rmtree(place.root / name, ignore_errors=True)
        shutil.copytree(started.root / name, place.root / name)
    place.scripts += started.scripts

    def relative(run: str) -> str:
        return Path(run).relative_to(started.root).as_posix()

    names = {"prepared": "prepared", "domain": "domain", "task": "task", "baseline": "base task"}
    runs = {name: relative(reported[of]["run"]) for name, of in names.items()}
    pinned = [f"--{kind}_adapter={place.root / runs[kind]}" for kind in ("domain", "task")]
    composed = last_json(place.run("compose", *pinned, "--weights", "1,0.5"))
    merged = place.start("inference", *pinned, "--merge_path", str(place.root / Whole.merged))
    evaluated = last_json(place.run("evaluate", *pinned, "--run.trackers", "tensorboard"))
    last_json(merged.wait())
    made = {"composed": composed["composed"], "evaluation": evaluated["run"]}
    found = {name: Path(run).relative_to(place.root).as_posix() for name, run in made.items()}
    return Whole(place.root, **runs, **found), place
