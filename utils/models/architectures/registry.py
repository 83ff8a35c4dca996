"""The architectures with peculiarities, by `model_type`. No other code asks which architecture a model has."""

from __future__ import annotations

from utils.models.architectures import minimax_m2, qwen3_moe
from utils.models.architectures.architecture import Architecture, PublishedModel

KNOWN: dict[str, Architecture] = {
    "minimax_m2": minimax_m2.ARCHITECTURE,
    "qwen3_moe": qwen3_moe.ARCHITECTURE,
}
USUAL = Architecture()


def of(model_type: object) -> Architecture:
    """What is peculiar to a config.json's `model_type`, whatever stands there; `USUAL` for one that is not known."""
    return KNOWN.get(model_type, USUAL) if isinstance(model_type, str) else USUAL


def published(source: str) -> PublishedModel | None:
    """The model with built-in shapes that a base model's source names; None for every other."""
    models = (architecture.published for architecture in KNOWN.values())
    return next((model for model in models if model and model.is_named(source)), None)
