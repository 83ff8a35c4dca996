"""Which preset's settings suit a model of this size, by its config.json alone: learning follows the parameters.

No torch: the command line asks before anything else is done. Counts are those of the usual decoder (embeddings, four
attention matrices, three of the MLP or of each expert), good to a few percent, for classes a factor of three apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import Config, reason_of
from utils.exceptions import MALFORMED, ConfigError, Problem
from utils.models.architectures import registry
from utils.models.model_shapes import ModelSizes

# parameters from which on a preset is taken, in billions
DENSE = ((20.0, "size_70b"), (3.5, "size_8b"), (1.2, "size_2b"), (0.3, "size_0_5b"))
# a mixture learns as its size says and fits as little: one class, for all that no preset of their own is made
MIXTURE = ((8.0, "size_30b_a3b"), *DENSE[1:])
_OWN_PRESET = 50.0


def preset_for(settings: Mapping[str, Any]) -> str | None:
    """The preset for a model with this config.json; None where the laptop's settings are for models of its size, or
    nothing can be told."""
    text = settings.get("text_config") or settings
    try:
        total, is_mixture = parameters(text)
    except MALFORMED:
        return None
    return preset_of(total, is_mixture=is_mixture, model_type=text.get("model_type"))


def preset_of(billions: float, *, is_mixture: bool, model_type: object) -> str | None:
    """As `preset_for`, for a model that is counted already."""
    published = registry.of(model_type).published
    if published and billions >= _OWN_PRESET:
        return published.preset
    return next((preset for least, preset in (MIXTURE if is_mixture else DENSE) if billions >= least), None)


def refuse_small_settings(preset: str, sizes: ModelSizes, stage: str) -> None:
    """Raises ConfigError where a large model would be trained as the default preset trains a small one.

    The command line takes the preset for a model's size where it can read config.json; of a hub it is known only later.
    """
    billions, usual = sizes.total / 1e9, Config.model_fields["preset"].default
    size_preset = preset_of(billions, is_mixture=bool(sizes.experts), model_type=sizes.model_type)
    if preset == usual and size_preset is not None:
        what = f"the base has {billions:.1f} billion parameters, and preset {usual} is for a few hundred million"
        fix = f"--preset {size_preset} ({reason_of(size_preset)}), or your own --{stage}.train.learning_rate"
        raise ConfigError(Problem(what, fix=fix))


def parameters(text: Mapping[str, Any]) -> tuple[float, bool]:
    """(billions of parameters, whether there are experts). Raises KeyError or TypeError for a config.json without
    the usual settings."""
    hidden, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    head = text.get("head_dim") or hidden // heads
    key_heads = text.get("num_key_value_heads") or heads
    experts = next((text[n] for n in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(n)), 0)
    inner = (text.get("moe_intermediate_size") if experts else 0) or text.get("intermediate_size") or 4 * hidden
    attention = 2 * hidden * head * (heads + key_heads)
    tables = text["vocab_size"] * hidden * (1 if text.get("tie_word_embeddings") else 2)
    return (tables + layers * (attention + 3 * hidden * inner * max(1, experts))) / 1e9, experts > 0


def config_of(source: str, revision: str = "", environment: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """The config.json of a directory, or of a hub id that was fetched before; None where it is not here."""
    places = [Path(source) / "config.json"]
    if source.count("/") == 1 and not Path(source).exists():
        home = Path(environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        cache = Path(environment.get("HF_HUB_CACHE") or home / "hub")
        places = [cache / f"models--{source.replace('/', '--')}" / "snapshots" / (revision or "none") / "config.json"]
    try:
        settings = json.loads(places[0].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None
