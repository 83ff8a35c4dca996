"""How many optimiser steps a run has, said before it begins: steps, tokens, passes, and whether they are too few."""

from __future__ import annotations

import math

from config import TrainSection
from utils.data.batches import TrainingData
from utils.exceptions import DataError, Problem
from utils.logger import event, warning

# AdamW's second moment averages over about 1 / (1 - 0.95) steps; with fewer the last ones still warm it up
FEWEST_STEPS = 20


def total(data: TrainingData, settings: TrainSection, what: str) -> int:
    """Optimiser steps of the whole run: `max_steps`, else those of all epochs. Raises DataError when there is none."""
    first = len(data.steps(0))
    if not first:
        raise DataError(Problem(f"{what}: there is nothing to train on", fix="look at the prepared data's manifest"))
    return settings.max_steps or sum(len(data.steps(epoch)) for epoch in range(settings.epochs))


def announce(data: TrainingData, settings: TrainSection, steps: int, what: str) -> None:
    """Say what will be trained, and warn where so few steps teach little."""
    first = data.steps(0)
    tokens = sum(data.num_labels(0, step) for step in first)
    passes = steps / len(first)
    event(
        f"{what}: what will be trained",
        steps=steps,
        passes=round(passes, 2),
        trained_tokens=round(tokens * passes),
        tokens_per_step=settings.batch_tokens,
    )
    if steps < FEWEST_STEPS:
        epochs = math.ceil(FEWEST_STEPS * settings.epochs / steps)
        batch = max(1, settings.batch_tokens * steps // FEWEST_STEPS)
        # max_steps overrides the passes and the size of a step, so nothing else helps where it is set
        flag = f"--{what.split()[0]}.train"  # "domain adapter": the section of its settings
        fix = f"more data, smaller steps ({flag}.batch_tokens {batch}) or more passes ({flag}.epochs {epochs})"
        warning(
            f"{what}: {steps} optimiser steps teach little, at least {FEWEST_STEPS} are advised",
            fix=f"{flag}.max_steps {FEWEST_STEPS} or more" if settings.max_steps else fix,
        )
