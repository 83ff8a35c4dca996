"""Going on from a finished run: more epochs or steps, with its data, its settings and its optimiser's state.

A finished run keeps its last checkpoint in a hidden folder beside the adapter; that is no part of the artefact, so it
may be removed, and `runs.py prune` does when it is old. The new run's first step is the one after the finished run's
last: moments and data order go on, and the learning rate is what a run of the new length has at that step.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from config import Config
from utils.adapters import parent_runs
from utils.artifacts import files
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.exceptions import ArtefactError, ConfigError, Problem
from utils.logger import event
from utils.models.base_model import BaseModel
from utils.training import checkpoints, training_identity

# what a person may change: how much more, and what trades memory for time
MORE = ("epochs", "max_steps")
FREE = (
    *MORE,
    "micro_batch_tokens",
    "gradient_checkpointing",
    "save_every_steps",
    "keep_checkpoints",
    "evals_per_epoch",
)


def finished_run(config: Config, base: BaseModel, stage: str) -> Run | None:
    """The run of `STAGE.continue_from`; None where none is named. Raises ArtefactError when it cannot be used."""
    named = getattr(config, stage).continue_from
    if not named:
        return None
    flag = f"--{stage}.continue_from"
    own = parent_runs.own_run(Path(named))
    if own is None:
        fix = (
            f"name a folder of {config.run.models_dir / stage}; an adapter of another tool: --{stage}.init_from {named}"
        )
        raise ArtefactError(Problem(f"{flag}: no complete run there", named, fix))
    run = Run(own, files.verify(own))
    reason = parent_runs.for_base(config, base)(run)
    if run.manifest["kind"] != stage:
        reason = f"it is a {run.manifest['kind']} run"
    if reason:
        raise ArtefactError(Problem(f"{flag} cannot be used: {reason}", named))
    if checkpoints.last_state(own) is None:
        what = f"{flag}: this run has no optimiser's state any more (kept since 2026-11-30, removed by prune)"
        raise ArtefactError(
            Problem(what, named, f"start from its adapter with a new optimiser: --{stage}.init_from {named}")
        )
    return run


def settings_of(config: Config, stage: str, run: Run) -> Config:
    """The finished run's settings of this stage, with as much more as these ask for.

    Raises ConfigError for a setting that was given and would make it another run.
    """
    try:
        theirs = Config.model_validate(files.read_object(run.directory / "config.json"))
    except ValidationError as error:
        fix = f"--{stage}.init_from {run.directory} starts from its adapter"
        raise ArtefactError(Problem(f"{run.directory / 'config.json'} is of another version", fix=fix)) from error
    own, before = getattr(config, stage), getattr(theirs, stage)
    problems = []
    for path, where in config.overrides.items():
        names = path.split(".")
        allowed = names[-1] in (*FREE, "continue_from")
        if names[0] == stage and not allowed and _at(config, names) != _at(theirs, names):
            anew = f"start anew from the adapter: --{stage}.init_from {run.directory}"
            if names[1] == "lora":  # the adapter has its rank and modules already
                anew = f"train a new adapter: without --{stage}.continue_from"
            what = f"--{path} ({where}) differs from the run that is gone on from, which has {_at(theirs, names)}"
            problems.append(Problem(what, _at(config, names), f"leave it out, or {anew}"))
    if problems:
        raise ConfigError(problems)
    more = {name: getattr(own.train, name) for name in FREE}
    if f"{stage}.train.epochs" in config.overrides and f"{stage}.train.max_steps" not in config.overrides:
        more["max_steps"] = 0
    update = {"train": before.train.model_copy(update=more), "init_from": "", "continue_from": own.continue_from}
    changed: dict[str, Any] = {"run": config.run.model_copy(update={"seed": theirs.run.seed})}
    if stage == "task":
        update |= training_identity.keep_settings(run)
        # whose documents are mixed in, and how much of the domain has to be left
        below = config.inputs.domain_adapter or theirs.inputs.domain_adapter
        changed["inputs"] = config.inputs.model_copy(update={"domain_adapter": below})
        kept = theirs.compose.domain_retention
        changed["compose"] = config.compose.model_copy(update={"domain_retention": kept})
    return config.model_copy(update={stage: before.model_copy(update=update), **changed})


def data_of(config: Config, run: Run) -> Run:
    """The prepared data of the finished run."""
    return parent_runs.parent_by_digest(run, "prepared", _roots(config.run.data_dir))


def domain_of(config: Config, run: Run) -> Run | None:
    """The domain adapter below the finished run, where it is one of ours."""
    with suppress(ArtefactError):
        return parent_runs.parent_by_digest(run, "domain", _roots(config.run.models_dir))
    return None


def refuse_other(run: Run, identity: Identity, stage: str) -> None:
    """Raises ArtefactError when the new run would differ from the finished one in more than its length."""
    before, now = dict(run.manifest["identity"]), dict(identity.values)
    for recorded in (before, now):
        for name in ("continue_from", "init_from"):
            recorded.pop(name, None)
        train = {key: value for key, value in recorded.get("train", {}).items() if key not in MORE}
        recorded["train"] = train
    if _plain(before) != _plain(now):
        changed = sorted(k for k in {*before, *now} if _plain(before.get(k)) != _plain(now.get(k)))
        what = f"{run.directory} was trained otherwise: {', '.join(changed)}"
        fix = f"start from its adapter with a new optimiser: --{stage}.init_from {run.directory}"
        raise ArtefactError(Problem(what, fix=fix))


def say(run: Run, stage: str) -> None:
    """One line about what goes on from where."""
    steps = run.manifest["measured"]["steps"]
    event(
        f"the {stage} adapter goes on from a finished run with its optimiser's state",
        path=run.directory,
        done_steps=steps,
        learning_rate="as in a run of the new length, from this step on",
    )


def _roots(root: Path) -> tuple[Path, ...]:
    return root, root / "controls"


def _at(config: Config, names: list[str]) -> Any:
    value: Any = config
    for name in names:
        value = getattr(value, name)
    return value


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
