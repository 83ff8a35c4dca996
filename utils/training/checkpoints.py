"""Checkpoints of a training run: published atomically, safetensors only, the newest valid one is resumed from.

    checkpoints/step-00000020/   adapter.safetensors  best.safetensors  optimizer.safetensors
                                 state.json  manifest.json

Tensors are whole, so a run goes on with any number of processes. Random states are not saved: each micro-batch seeds
the generator from (seed, step, its number), so they are a function of the step.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from config import TrainSection
from utils import disk
from utils.artifacts import files
from utils.artifacts.runs import IDENTITY
from utils.exceptions import ArtefactError, Problem
from utils.logger import warning
from utils.models.parallel import sharding

Tensors = dict[str, torch.Tensor]
# the last checkpoint of a finished run, beside its adapter and no part of the artefact
LAST = ".last_state"
# headers, state and manifest
_SMALL_FILES = 1 << 17


@dataclass
class TrainingState:
    """Where a run stands: everything that is not a tensor. `step` optimiser steps are done."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    best_dev_loss: float = float("inf")
    best_step: int = 0
    dev_losses: list[tuple[int, float]] = field(default_factory=list)
    # of the first step, before which the adapter does nothing, and of the newest
    first_loss: float | None = None
    last_loss: float | None = None
    # what keeps the domain, once that is decided (`keep_decision.decide`)
    keeping: dict[str, Any] | None = None


def size_bytes(parameters: Tensors | dict[str, torch.nn.Parameter]) -> int:
    """About what one checkpoint takes on the disk: adapter, best adapter and AdamW's two moments, all in float32."""
    return sum(16 * p.numel() for p in parameters.values()) + _SMALL_FILES


def require_space(root: Path, parameters: dict[str, torch.nn.Parameter], keep: int) -> None:
    """Raises ArtefactError when the disk cannot hold the checkpoints of a run, and the one that is being written."""
    there = len(_directories(root))
    disk.require(root, size_bytes(parameters) * max(1, keep + 1 - there), f"training with {keep} kept checkpoints")


def save(
    root: Path,
    state: TrainingState,
    adapter: Tensors,
    best: Tensors,
    optimizer: Tensors,
    keep: int,
    **facts: Any,
) -> None:
    """Publish one checkpoint and remove all but the `keep` newest; its manifest holds `facts`.

    `adapter` and `best` are whole tensors, `optimizer` is what `optimizer_tensors` says.
    Raises NonFiniteError when a tensor is not finite, and ArtefactError when the disk is too small; then nothing of it
    is there and the checkpoints before it are as they were.
    """
    from safetensors.torch import save_file

    target = root / f"step-{state.step:08d}"
    if target.exists():  # a resumed run that stops again before its next step has nothing new to say
        return
    tensors = {"adapter": adapter, "best": best, "optimizer": optimizer}
    for name, group in tensors.items():
        sharding.refuse_non_finite(group, f"the {name} of the checkpoint after step {state.step}")
    disk.require(root, sum(t.nbytes for group in tensors.values() for t in group.values()) + _SMALL_FILES, str(target))
    about = {"kind": "checkpoint", "step": state.step, "run": _run(root), **facts}
    with files.publish(target, lambda: about) as temporary:
        for name, group in tensors.items():
            save_file(group, temporary / f"{name}.safetensors")
        files.write_json(temporary / "state.json", _finite_json(asdict(state)))
    for old in _directories(root)[keep:]:
        _remove(old)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's state, by number of the parameter and name."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, s in state.items() for key, value in s.items()}


def whole(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> Tensors:
    """The tensors, whole, in main memory; nothing where they are not to be kept.

    Of a sharded model every rank has to call it: they gather one full tensor after the other.
    """
    named = ((name, sharding.whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named if keep}


def copy_of(parameters: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """What this process holds of the parameters, copied to main memory."""
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in parameters.items()}


@torch.no_grad()
def put(parameters: Mapping[str, torch.nn.Parameter], tensors: Tensors) -> None:
    """Give the parameters these values: whole ones, or what `copy_of` took."""
    for name, parameter in parameters.items():
        parameter.copy_(sharding.like(tensors[name], parameter))


def conditions(train: TrainSection, *, processes: int, is_dealt_out: bool, expert_ranks: int = 1) -> dict[str, Any]:
    """What decides the last bits of a step besides the settings that decide the result."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "dealt out": is_dealt_out,  # the recorded name of "sharded"
        "ranks that share experts": expert_ranks,
        "micro_batch_tokens": train.micro_batch_tokens,
        "gradient_checkpointing": train.gradient_checkpointing,
    }


def refuse_other(newest: Path, *, frozen: str, conditions: Mapping[str, Any]) -> None:
    """Raises ArtefactError when a checkpoint was made on other frozen adapters; warns of other conditions."""
    manifest = files.read_manifest(newest)
    if manifest.get("frozen", frozen) != frozen:
        what = f"{newest} was trained on another frozen adapter than the one that is loaded"
        raise ArtefactError(Problem(what, fix=f"restore that adapter, or remove {newest.parent} to start anew"))
    before = manifest.get("conditions", {})
    changed = [
        f"{name} {before[name]} -> {conditions.get(name)}" for name in before if before[name] != conditions.get(name)
    ]
    if changed:
        warning("resumed under other conditions: the result may differ in its last bits", changed=", ".join(changed))


def newest_valid(root: Path) -> Path | None:
    """The valid checkpoint of the highest step (by name, never by time); damaged ones are set aside with a warning.

    What a killed process left half-written or half-removed goes: the caller holds the lock of the run.
    """
    _remove_hidden(root)
    for directory in _directories(root):
        try:
            manifest = files.verify(directory)
            if manifest.get("step") != _step(directory) or manifest.get("run") != _run(root):
                raise ArtefactError(Problem(f"{directory} is a checkpoint of another run or step"))
            return directory
        except ArtefactError as error:
            aside = _unused(directory.with_name(f"invalid-{directory.name}"))
            directory.rename(aside)
            reason = "; ".join(problem.what for problem in error.problems)
            warning("a damaged checkpoint was set aside", path=aside, reason=reason)
    return None


def load(directory: Path, optimizer: torch.optim.Optimizer) -> tuple[TrainingState, Tensors, Tensors]:
    """State, current adapter and best adapter (empty before a dev loss), whole; the optimiser is restored in place.

    Raises ArtefactError for one that is intact and was written by another version of this program.
    """
    from safetensors.torch import load_file

    try:
        saved = files.read_json(directory / "state.json")
        saved["best_dev_loss"] = float("inf") if saved["best_dev_loss"] is None else saved["best_dev_loss"]
        saved["dev_losses"] = [(int(step), float(loss)) for step, loss in saved["dev_losses"]]
        progressed = TrainingState(**saved)
        _restore_optimizer(optimizer, load_file(directory / "optimizer.safetensors"))
        adapter, best = [load_file(directory / f"{name}.safetensors") for name in ("adapter", "best")]
    except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
        fix = f"remove {directory.parent} to start anew, or go on with the version that wrote it"
        raise ArtefactError(Problem(f"{directory} was written by another version ({error!r})", fix=fix)) from error
    # without a dev measurement yet there is no best, and nothing may be published as if there were
    return progressed, adapter, best if saved["best_step"] else {}


def keep_last(run: Path) -> None:
    """Keep the last checkpoint of a finished run, so that another can go on from it."""
    newest, target = next(iter(_directories(run / files.SCRATCH)), None), run / LAST
    if newest is not None and not target.exists():
        with suppress(OSError):
            newest.rename(target)


def last_state(run: Path) -> Path | None:
    """The last checkpoint of a finished run, or None when it is not there. Raises ArtefactError when it is damaged."""
    if not (run / LAST / files.MANIFEST).is_file():
        return None
    manifest = files.verify(run / LAST)
    if manifest.get("run") != _run(run / LAST):
        raise ArtefactError(Problem(f"{run / LAST} is the state of another run", fix="remove it"))
    return run / LAST


def discard(root: Path) -> None:
    """Remove the checkpoints of a finished run; what was set aside as damaged stays for a person to look at."""
    for directory in _directories(root):
        _remove(directory)
    _remove_hidden(root)
    with suppress(OSError):  # not there, or not empty
        root.rmdir()


def _run(root: Path) -> str:
    """What the run is that these checkpoints belong to: a valid one of another run must not be gone on from."""
    identity = root.parent / IDENTITY
    return files.fingerprint(files.read_json(identity)) if identity.exists() else ""


def _directories(root: Path) -> list[Path]:
    paths = [path for path in root.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdecimal()]
    return sorted(paths, key=_step, reverse=True)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def _unused(path: Path) -> Path:
    """This path or, when something is there, one with a number behind it."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


def _remove(directory: Path) -> None:
    # renamed first: a half-removed checkpoint must not look like a damaged one
    doomed = directory.with_name(f".removing-{directory.name}")
    with suppress(FileNotFoundError):  # two commands that find a run complete tidy it up at once
        directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _remove_hidden(root: Path) -> None:
    for hidden in root.glob(".*"):
        shutil.rmtree(hidden, ignore_errors=True)


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = sharding.like(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _finite_json(state: dict[str, Any]) -> dict[str, Any]:
    """Infinity is not JSON: a run without a dev loss yet writes null."""
    return {**state, "best_dev_loss": None if state["best_dev_loss"] == float("inf") else state["best_dev_loss"]}
