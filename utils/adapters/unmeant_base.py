"""What is refused before a base model is built or downloaded: inputs that are not there, runs of another base."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from config import PRESETS, Config
from utils import flags
from utils.adapters import parent_runs
from utils.artifacts import files, runs
from utils.artifacts.runs import Run
from utils.exceptions import ArtefactError, Problem, path_fix
from utils.models import sources
from utils.secrets import redact

PREPARED, ADAPTERS = ("prepared",), ("domain", "task", "composed")


def refuse_missing_inputs(config: Config) -> None:
    """Raises ArtefactError with every run or adapter of the settings that is not there, and the run of that name."""
    inputs, stages = config.inputs, ("domain", "task")
    given = {"--inputs.prepared": inputs.prepared, "--composed": inputs.composed}
    given |= {f"--{stage}_adapter": getattr(inputs, f"{stage}_adapter") for stage in stages}
    given |= {f"--{stage}.init_from": getattr(config, stage).init_from for stage in stages}
    given |= {f"--{stage}.continue_from": getattr(config, stage).continue_from for stage in stages}
    named = [*given.items(), *(("--compose.also", path) for path in config.compose.also)]
    problems = []
    for flag, path in named:
        if path and not Path(path).expanduser().exists():
            kind = "prepared run" if flag == "--inputs.prepared" else "adapter in PEFT's format"
            what = f"{flag} {path}: no {kind} and no run of ours is there"
            problems.append(Problem(what, "no such directory", _run_of_name(config, path, flag) or path_fix(path)))
    if problems:
        raise ArtefactError(problems)


def _run_of_name(config: Config, name: str, flag: str) -> str:
    """The run that `runs.py list` shows by this name, as a path, one of the flag's stage first; empty without one."""
    roots = (config.run.models_dir, config.run.data_dir)
    matches = [path for root in roots for path in (root / name, *root.glob(f"*/{Path(name).name}")) if path.is_dir()]
    matches.sort(key=lambda path: path.parent.name not in flag)
    if not matches:
        return ""
    unfinished = "" if (matches[0] / files.MANIFEST).exists() else " (unfinished: repeat its command first)"
    return f"did you mean {matches[0]}?{unfinished}"


def refuse(config: Config, reads: Sequence[str]) -> None:
    """Raises ArtefactError where the script `reads` runs of these stages, and none can fit before the base is made.

    Only where the preset's base model is not here yet: one that is here costs nothing to compare by digest, and one
    that a setting names may be the same model under another name.
    """
    section, usual = config.base, PRESETS[config.preset]().base.source
    is_named = "base.source" in config.overrides or section.source != usual
    if not reads or is_named or config.inputs.same_base or sources.is_here(section, config.run.models_dir):
        return
    candidates = _candidates(config, reads)
    if candidates is None or any(run.manifest["base"]["source"] == section.source for run in candidates):
        return
    if not candidates and reads == PREPARED:
        hint = flags.given(config, "base", "data")
        runs.parent(config.run.data_dir, "prepared", "", lambda run: "", flag="", hint=hint)
    if not candidates:
        raise ArtefactError(parent_runs.nothing_there(config))
    ways = {
        flags.to_use(run.manifest["base"], section.source, section.revision).rpartition(" with ")[2]: run
        for run in candidates[::-1]
    }
    meant = f"--base.source {shlex.quote(section.source)}"
    problems = [
        Problem(f"{run.directory} is of another base model", fix=f"to use it, repeat your command with {way}")
        for way, run in reversed(ways.items())
    ]
    what = (
        f"no setting names the base model, and no run is of the usual one, {redact(section.source)}, which is not here"
    )
    raise ArtefactError([*problems[:5], Problem(what, fix=f"to build or download it first: {redact(meant)}")])


def _candidates(config: Config, reads: Sequence[str]) -> list[Run] | None:
    """The runs that a command could read, newest first; None where it names what is no run of ours."""
    inputs, named = config.inputs, [config.inputs.prepared]
    if reads == ADAPTERS:
        settings = config.evaluate
        named = [inputs.domain_adapter, inputs.task_adapter, inputs.composed, *config.compose.also]
        named += [*settings.also, *settings.matrix_domain, *settings.matrix_task]
    if any(named):
        own = [parent_runs.own_run(Path(path)) for path in named if path]
        return [runs.checked(place, files.read_manifest(place)) for place in own] if all(own) else None
    root = config.run.data_dir if reads == PREPARED else config.run.models_dir
    return [run for stage in reads for run in runs.complete_runs(root, stage)]
