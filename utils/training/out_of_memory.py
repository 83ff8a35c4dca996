"""What a training says when memory runs out: the command that goes on with less, by settings that change no result."""

from __future__ import annotations

import os
from collections.abc import Sequence

from config import TrainSection
from utils import flags
from utils.exceptions import OutOfMemory, Problem
from utils.training.guards import NAMED


def error_of(what: str, step: int, settings: TrainSection, names: Sequence[str]) -> OutOfMemory:
    """A step that does not fit, with what was in its batches and the setting that makes it smaller."""
    section, tokens = f"--{what.split()[0]}.train", settings.micro_batch_tokens
    less = []
    if tokens > settings.max_sequence_tokens:
        less.append(f"{section}.micro_batch_tokens {max(settings.max_sequence_tokens, tokens // 2)}")
    if not settings.gradient_checkpointing:
        less.append(f"{section}.gradient_checkpointing true")
    again = "the same launch with" if "LOCAL_RANK" in os.environ else flags.command()
    fix = "a shorter max_sequence_tokens, a smaller model or --base.quantization is what is left"
    if less:
        fix = f"go on with less memory, the result stays the same: {again} {' '.join(less)}"
    return OutOfMemory(
        Problem(
            f"memory ran out in step {step} of the {what}; the last checkpoint is kept", ", ".join(names[:NAMED]), fix
        )
    )
