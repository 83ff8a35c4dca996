"""Checkpoints of a training run: published atomically, safetensors only, the newest valid one is resumed from.

    checkpoints/step-00000020/   adapter.safetensors  best.safetensors  optimizer.safetensors
                                 state.json  manifest.json

Random states are not saved: each step seeds the generator from (seed, step, rank), so they are a function of the step.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from utils import files
from utils.exceptions import ArtefactError
from utils.logger import warning

Tensors = dict[str, torch.Tensor]


@dataclass
class Progressed:
    """Where a run stands: everything that is not a tensor. `step` optimiser steps are done."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    best_dev_loss: float = float("inf")
    best_step: int = 0
    dev_losses: list[tuple[int, float]] = field(default_factory=list)


def save(
    root: Path, state: Progressed, adapter: Tensors, best: Tensors, optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """Publish one checkpoint and remove all but the `keep` newest."""
    from safetensors.torch import save_file

    target = root / f"step-{state.step:08d}"
    if target.exists():  # a resumed run that stops again before its next step has nothing new to say
        return
    with files.publish(target, lambda: {"kind": "checkpoint", "step": state.step, "run": _run(root)}) as temporary:
        save_file(adapter, temporary / "adapter.safetensors")
        save_file(best, temporary / "best.safetensors")
        save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        files.write_json(temporary / "state.json", _finite_json(asdict(state)))
    for old in _directories(root)[keep:]:
        _remove(old)


def newest_valid(root: Path) -> Path | None:
    """The valid checkpoint of the highest step (by name, never by time); damaged ones are set aside with a warning."""
    for directory in _directories(root):
        try:
            manifest = files.verify(directory)
            if (manifest.get("run"), f"step-{manifest.get('step'):08d}") == (_run(root), directory.name):
                return directory
            raise ArtefactError("it is a checkpoint of another run or step")
        except ArtefactError as error:
            aside = directory.with_name(f"invalid-{directory.name}-{os.getpid()}")
            directory.rename(aside)
            warning("a damaged checkpoint was set aside", path=aside, reason=str(error).splitlines()[0])
    return None


def load(directory: Path, optimizer: torch.optim.Optimizer) -> tuple[Progressed, Tensors, Tensors]:
    """State, current adapter and best adapter (empty before a dev loss); the optimiser is restored in place."""
    from safetensors.torch import load_file

    saved = files.read_json(directory / "state.json")
    saved["best_dev_loss"] = float("inf") if saved["best_dev_loss"] is None else saved["best_dev_loss"]
    saved["dev_losses"] = [(int(step), float(loss)) for step, loss in saved["dev_losses"]]
    _restore_optimizer(optimizer, load_file(directory / "optimizer.safetensors"))
    adapter, best = [load_file(directory / f"{name}.safetensors") for name in ("adapter", "best")]
    # without a dev measurement yet there is no best, and nothing may be published as if there were
    return Progressed(**saved), adapter, best if saved["best_step"] else {}


def discard(root: Path) -> None:
    """Remove the checkpoints of a finished run; what was set aside as damaged stays for a person to look at."""
    for directory in _directories(root):
        _remove(directory)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


def _run(root: Path) -> str:
    """What the run is that these checkpoints belong to: a valid one of another run must not be gone on from."""
    identity = root.parent / "identity.json"
    return files.fingerprint(files.read_json(identity)) if identity.exists() else ""


def _directories(root: Path) -> list[Path]:
    return sorted((p for p in root.glob("step-*") if p.is_dir()), key=lambda p: p.name, reverse=True)


def _remove(directory: Path) -> None:
    # renamed first: a half-removed checkpoint must not look like a damaged one
    doomed = directory.with_name(f".removing-{directory.name}")
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).contiguous() for index, s in state.items() for key, value in s.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _finite_json(state: dict[str, Any]) -> dict[str, Any]:
    """Infinity is not JSON: a run without a dev loss yet writes null."""
    return {**state, "best_dev_loss": None if state["best_dev_loss"] == float("inf") else state["best_dev_loss"]}
