"""The learning rate of a step: by its number alone, so that a resumed run does the same."""

from __future__ import annotations

import math

from config import TrainSection


def learning_rate(step: int, total: int, settings: TrainSection) -> float:
    """Linear warm-up, then a cosine to min_learning_rate_ratio of the peak; a pure function of the step."""
    warmup = max(1, round(settings.warmup_ratio * total))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))
