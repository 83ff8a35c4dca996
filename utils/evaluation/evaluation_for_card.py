"""The evaluation of a composed model, found by what was evaluated: the base, the adapters and the recipe, by digest.

A published adapter or model cannot be changed after it was sealed, and is often made before it is evaluated. So its
numbers are looked up when its card is written: for a merged model while it is made, for a hub when it is uploaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.artifacts import files, runs
from utils.artifacts.runs import Run
from utils.exceptions import ArtefactError
from utils.logger import event, warning


@dataclass(frozen=True)
class Evaluation:
    """A complete evaluation and its results.json."""

    run: Run
    results: dict[str, Any]


def evaluation_of(
    models_dir: Path, base_digest: str, adapters: Sequence[Run], recipe: Mapping[str, Any]
) -> Evaluation | None:
    """The newest complete evaluation of exactly these adapters in this order by this recipe, or None."""
    fingerprint = files.fingerprint([base_digest, recipe, [run.digest for run in adapters]])
    for run in runs.complete_runs(models_dir, "evaluation"):
        try:
            results = files.read_json(run.directory / "results.json")
            composition = results.get("composition") or {}
            recorded = [run.manifest["base"]["digest"], composition.get("recipe"), composition.get("adapters")]
            if files.fingerprint(recorded) != fingerprint:
                continue
            files.verify(run.directory)
        except ArtefactError as error:  # damaged: its numbers are not to be published
            warning("an evaluation cannot be used", path=run.directory, reason=error.problems[0].what)
            continue
        event("the card has the numbers of this evaluation", path=run.directory)
        return Evaluation(run, results)
    return None
