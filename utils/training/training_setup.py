"""What one training run is, and what it measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import TrainSection
from utils.data.batches import Batch, TrainingData
from utils.training.keeping.keep_decision import KeepDomain
from utils.training.schedules.active_adapters import AdapterSchedule

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel


@dataclass(frozen=True)
class TrainingSetup:
    """What one training run is.

    The adapter `schedule.trained` of `model` is active and trainable. Checkpoints go to `directory/checkpoints`, one
    line per step to `directory/metrics.jsonl`. `what` names the run in messages.
    """

    model: PeftModel
    data: TrainingData
    dev: list[Batch]
    settings: TrainSection
    schedule: AdapterSchedule
    seed: int
    directory: Path
    accelerator: Accelerator
    what: str
    # with `data` that can add to a step what keeps the domain (`KeptPairs`)
    keep: KeepDomain | None = None
    # the checkpoint of a finished run that this one begins with
    go_on_from: Path | None = None


@dataclass(frozen=True)
class TrainingOutcome:
    """What a finished run measured."""

    steps: int
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    kept_step: int
    best_dev_loss: float | None
    dev_losses: list[tuple[int, float]]
    peak_memory_bytes: int
    world_size: int
    is_dealt_out: bool
    keeping: dict[str, Any] | None = None
