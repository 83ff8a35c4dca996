"""What is watched while an adapter is trained: numbers that must be finite, frozen adapters that must stay, metrics.

A non-finite number stops every rank within one step, also when only one of them met it, and names the batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils import disk
from utils.artifacts import files
from utils.exceptions import NonFiniteError, Problem, VerificationError
from utils.logger import warning
from utils.models.parallel import expert_parallel, ranks, sharding

if TYPE_CHECKING:
    from accelerate import Accelerator

    from utils.training.checkpoints import TrainingState
    from utils.training.training_setup import TrainingSetup

NAMED = 8
# more than by which batches of one corpus usually differ
WORSE_NATS = 0.5


def refuse_without_gradient(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """After the first backward: every trained tensor has a finite gradient, and every B one that is not zero.

    A tensor without a gradient would silently stay as it is (FP8 experts do that). A's gradient is zero while B is.
    Every rank has to call it. Raises NonFiniteError that names the tensors.
    """
    gradients = {name: sharding.whole(p.grad) for name, p in parameters.items() if p.grad is not None}
    faults = {
        "are trainable and got no gradient": [name for name in parameters if name not in gradients],
        "got a gradient with NaN or infinity": [n for n, g in gradients.items() if not torch.isfinite(g).all()],
        "are a B whose gradient is all zero": [n for n, g in gradients.items() if "lora_B" in n and not g.any()],
    }
    fix = "nothing was trained; this is a defect of the base model's files or of a library"
    problems = [
        Problem(f"after the first backward pass {len(names)} of {len(parameters)} tensors {what}", names[:5], fix)
        for what, names in faults.items()
        if names
    ]
    if problems:
        raise NonFiniteError(problems)


def non_finite(what: str, names: Sequence[str]) -> NonFiniteError:
    """A loss or gradient that is NaN or infinite, with what was in the batch."""
    return NonFiniteError(
        Problem(
            f"the {what} is NaN or infinite; the last checkpoint is kept",
            ", ".join(names[:NAMED]),
            "look at these documents or examples, or lower the learning rate",
        )
    )


def from_every_rank(accelerator: Accelerator, names: list[str]) -> list[str]:
    """The names of all ranks, on each of them."""
    if accelerator.num_processes == 1:
        return names
    from accelerate.utils import gather_object

    return list(dict.fromkeys(gather_object(names)))


def frozen_adapters(model: torch.nn.Module) -> str:
    """Digest of the adapters that are on the model and not trained; empty when there are none."""
    frozen = sorted((n, p) for n, p in model.named_parameters() if "lora_" in n and not p.requires_grad)
    digest = hashlib.sha256()
    for name, parameter in frozen:
        digest.update(name.encode() + b"\0")
        whole = sharding.whole(parameter).detach().cpu().contiguous()
        digest.update(whole.flatten().view(torch.uint8).numpy())
    return digest.hexdigest() if frozen else ""


def refuse_diverged(module: torch.nn.Module, step: int, what: str) -> None:
    """Raises VerificationError, on every rank, when what several of them hold is no longer the same in each.

    An average of gradients keeps adapters equal only as long as nothing else touches one of them; what is published is
    rank 0's, so the others would have trained for nothing, or it on gradients of something else. Factors of
    shared experts are compared among the ranks that have the same experts, shards among the copies of the model (HSDP).
    """
    if ranks.size() == 1:
        return
    held = {name: sharding.checksum(tensor) for name, tensor in sharding.held_whole(module)}
    ranks.refuse_unequal({"step": step, **held}, f"{what}, after step {step},")
    part = expert_parallel.group_index(module)
    for whose, copied, copy_of in (
        ("ranks that share the same experts", expert_parallel.copied_factors(module), part),
        ("copies of the model", *sharding.copied_shards(module)),
    ):
        sums = {name: sharding.checksum(sharding.own(parameter)) for name, parameter in copied}
        if unequal := ranks.unequal_copies(sums, copy_of):
            difference = f"{what}, after step {step}, differs between {whose}: {len(unequal)} tensors"
            raise VerificationError(Problem(difference, unequal[:5], ranks.SUSPECT))


def warn_if_worse(setup: TrainingSetup, state: TrainingState, dev: float | None) -> None:
    """Say when dev and the last batch are predicted far worse than the first batch was before the first step.

    `dev` is the loss of what is kept, in nats per token. One batch may be easier than another, or than dev.
    """
    first, last = state.first_loss, state.last_loss
    if first is not None and last is not None and dev is not None and min(last, dev) > first + WORSE_NATS:
        setting = f"--{setup.schedule.trained}.train.learning_rate"
        warning(
            f"the {setup.what} made the model worse: {first:.3g} nats per token before the first step, {last:.3g} in "
            f"the last, {dev:.3g} on dev; lower {setting} (it is {setup.settings.learning_rate:g})"
        )


def refuse_changed(before: str, after: str, what: str) -> None:
    """Raises VerificationError when the frozen adapters are not what they were."""
    if before != after:
        fix = "this is a bug of the training loop or of a library: nothing was published"
        raise VerificationError(Problem(f"{what}: the frozen adapter below it changed while it was trained", fix=fix))


class Metrics:
    """metrics.jsonl, cut back to the step a run is resumed from, and accelerate's trackers."""

    def __init__(self, path: Path, step: int, accelerator: Accelerator):
        self.accelerator = accelerator
        self.path = path if accelerator.is_main_process else None
        if self.path is not None and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if 0 < _step_of(line) <= step]
            files.write_text(path, "".join(line + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """One line, whole or not at all. Raises ArtefactError when the disk is full."""
        if self.path is not None:
            disk.append_line(self.path, json.dumps(values))
        self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])

    def sync(self) -> None:
        """Put the lines on the disk: a checkpoint must not outlive the metrics of its steps."""
        if self.path is not None and self.path.exists():
            with disk.errors(self.path), self.path.open("rb") as handle:
                os.fsync(handle.fileno())


def _step_of(line: str) -> int:
    """The step of a line of metrics; 0 for one that a dead machine left damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return 0
