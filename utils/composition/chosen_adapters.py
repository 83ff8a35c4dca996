"""Which adapters a command works with: those of the composed run that was made last, unless it is told otherwise.

A composed run is what a person made of two adapters, so it stands for them in `inference`, `evaluate`, `benchmark` and
the merge, wherever its adapters came from. What "newest" cannot decide is refused, with the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from config import Config
from utils import flags
from utils.adapters import adapter_tokenizer, parent_runs
from utils.artifacts import files, runs
from utils.artifacts.runs import Run
from utils.exceptions import ArtefactError, ConfigError, Problem
from utils.logger import event, warning
from utils.models.base_model import BaseModel

STAGE = "composed"
COMPOSE = runs.STAGES[STAGE]


@dataclass(frozen=True)
class InUse:
    """The adapters, domain before task, then further ones; `composed` is the run that was made of all of them, if any.

    `is_alone`: the only one of `adapters` is a composed one, whose parts are not known or not there.
    """

    adapters: tuple[Run, ...]
    composed: Run | None = None
    is_alone: bool = False


def in_use(config: Config, base: BaseModel, which: str = "both", *, needs_parts: bool = False) -> InUse:
    """What these settings choose; `which` as in `inference.adapters`. Says in one line what it is and why.

    `needs_parts`: they are to be composed anew, so a composed adapter whose parts are gone will not do.

    In this order: `inputs.composed`; adapters that a setting names (with the newest composed run of exactly these, if
    there is one); the newest composed run of this base model; the newest adapters. Raises ArtefactError when something
    is missing or does not fit, or when an adapter was made after the newest composed run and is not in it.
    """
    if (chosen := _chosen(config, base)) is not None:
        return _with_parts(config, base, chosen, which, needs_parts)
    adapters = parent_runs.adapter_runs(config, base, which)
    if which == "both" and (run := made_of(config, base, adapters)):
        event("using the newest composed run of these adapters", path=run.directory)
        return InUse(tuple(adapters), run)
    return InUse(tuple(adapters))


def pair(config: Config, base: BaseModel) -> tuple[Run | None, Run | None]:
    """(domain run, task run) of what is in use; one is None where only the other is. Raises as `in_use`."""
    chosen = _chosen(config, base)
    if chosen is None:
        return parent_runs.pair(config, base)
    parts = parts_of(config, base, chosen)
    if not config.inputs.composed:
        _refuse_newer(config, base, chosen, parts, "both")
    if len(parts) > 1:
        return parts[0], parts[1]
    return (None, parts[0]) if parts[0].manifest["kind"] == "task" else (parts[0], None)


def parts_of(config: Config, base: BaseModel, composed: Run) -> list[Run]:
    """The adapters a composed run was made of, found by digest. Raises ArtefactError when one is gone or changed."""
    if composed.manifest["identity"].get("on") == parent_runs.EXTERNAL:
        what = "the adapters that this composed adapter was made of are not known"
        raise ArtefactError(Problem(what, str(composed.directory), "name a composed run of ours"))
    by_digest = {parent["digest"]: parent for parent in composed.manifest["parents"]}
    return [_part(config, base, composed, by_digest[one]) for one in composed.manifest["identity"]["adapters"]]


def _part(config: Config, base: BaseModel, composed: Run, parent: dict[str, str]) -> Run:
    kind, path = parent["kind"], Path(parent["path"])
    for root in (config.run.models_dir, config.run.models_dir / "controls"):
        for run in runs.complete_runs(root, kind):
            if run.digest == parent["digest"]:
                files.verify(run.directory)
                return run
    with suppress(ArtefactError):  # an adapter of another tool, or a run that lies elsewhere
        own = parent_runs.own_run(path)
        inputs = adapter_tokenizer.as_composed(config.inputs, composed)
        composed_config = config.model_copy(update={"inputs": inputs})
        run = Run(own, files.verify(own)) if own else parent_runs.external_run(composed_config, base, kind, path)
        if run.digest == parent["digest"]:
            return run
    what = f"{composed.directory} was made from the {kind} adapter {path}, which is gone or was changed"
    raise ArtefactError(Problem(what, parent["digest"][:12], "bring it back, or name another with --composed"))


def _chosen(config: Config, base: BaseModel) -> Run | None:
    """The composed run that stands for its adapters: pinned, or the newest; None where a setting names adapters."""
    inputs, pinned = config.inputs, config.inputs.composed
    given = {
        "--domain_adapter": inputs.domain_adapter,
        "--task_adapter": inputs.task_adapter,
        "--compose.also": config.compose.also,
        "--task.on": parent_runs.names_task_on(config),
    }
    named = [flag for flag, is_given in given.items() if is_given]
    fits = parent_runs.for_base(config, base)
    if not pinned:
        if named:
            return None
        return next((run for run in runs.complete_runs(config.run.models_dir, STAGE) if not fits(run)), None)
    if named:
        raise ConfigError(Problem("--composed brings its own adapters", pinned, f"leave out {', '.join(named)}"))
    own = parent_runs.own_run(Path(pinned))
    run = Run(own, files.verify(own)) if own else parent_runs.external_run(config, base, STAGE, Path(pinned))
    if run.manifest["kind"] != STAGE:
        fix = f"name a folder of {config.run.models_dir / STAGE}"
        raise ArtefactError(Problem(f"--composed: this is a {run.manifest['kind']} run", pinned, fix))
    if reason := fits(run):
        raise ArtefactError(Problem(f"--composed cannot be used: {reason}", pinned))
    return run


def _with_parts(config: Config, base: BaseModel, chosen: Run, which: str, needs_parts: bool) -> InUse:
    """The composed run with its adapters, or with one of them; alone where they are not there and not needed."""
    why = "--composed names it" if config.inputs.composed else "the newest of this base model; see --composed"
    event("using the composed run", path=chosen.directory, why=why)
    try:
        parts = parts_of(config, base, chosen)
    except ArtefactError as error:
        if which != "both" or needs_parts:
            raise
        warning("the composed adapter is used as it is: its parts are not there", reason=error.problems[0].what)
        return InUse((chosen,), chosen, is_alone=True)
    if not config.inputs.composed:
        _refuse_newer(config, base, chosen, parts, which)
    if which == "both":
        return InUse(tuple(parts), chosen)
    one = parts[which == "task"] if len(parts) > 1 else parts[0]
    if one.manifest["kind"] != which and len(parts) == 1:
        what = f"{chosen.directory} was made of a {one.manifest['kind']} adapter alone"
        raise ArtefactError(Problem(what, which, f"--{which}_adapter PATH names another"))
    return InUse((one,))


def made_of(config: Config, base: BaseModel, adapters: Sequence[Run]) -> Run | None:
    """The newest composed run of exactly these adapters in this order."""
    digests = [run.digest for run in adapters]
    for run in runs.complete_runs(config.run.models_dir, STAGE):
        identity = run.manifest["identity"]
        if identity["base"] == base.digest and identity["adapters"] == digests:
            return run
    return None


def _refuse_newer(config: Config, base: BaseModel, chosen: Run, parts: Sequence[Run], which: str) -> None:
    """Raises ArtefactError when an adapter that would be taken otherwise was made after `chosen` and is not in it."""
    usual: list[Run | None] = []
    with suppress(ArtefactError):
        usual = list(parent_runs.pair(config, base, quiet=True))
    candidates = {"domain": usual[:1], "task": usual[1:]}.get(which, usual)
    known, made_at = {run.digest for run in parts}, chosen.manifest["created_ns"]
    for run in filter(None, candidates):
        if run.digest not in known and run.manifest.get("created_ns", 0) > made_at:
            kind = run.manifest["kind"]
            what = f"{run.directory} was trained after {chosen.directory} was composed of others: which is meant?"
            anew = COMPOSE + flags.given(config, "base")
            fix = f"--composed {chosen.directory}, or --{kind}_adapter {run.directory}, or compose anew: {anew}"
            raise ArtefactError(Problem(what, fix=fix))
