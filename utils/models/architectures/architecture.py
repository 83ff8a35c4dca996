"""What can be peculiar to an architecture: one value with a field for each peculiarity. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.exceptions import Problem
from utils.models.model_shapes import Dtype, ModelSizes

# a model's config.json
Settings = Mapping[str, Any]


def no_missing_settings(settings: Settings, place: str) -> list[Problem]:
    """Where transformers' own defaults are the model's, a config.json may leave anything out."""
    return []


@dataclass(frozen=True)
class PublishedModel:
    """A model whose shapes are built in, for when its config.json cannot be fetched.

    `is_named` says whether a base model's source is this one; `preset` has the settings that train it.
    """

    title: str
    settings: Settings
    is_named: Callable[[str], bool]
    preset: str


@dataclass(frozen=True)
class Architecture:
    """The peculiarities of one `model_type`; the defaults hold for every model without a module of its own.

    `sizes` is config.json -> shapes without building the model; it raises KeyError for a setting that is missing.
    """

    sizes: Callable[[Settings], ModelSizes] | None = None
    published: PublishedModel | None = None
    # ends of names in the model: parameters and buffers that are float32 whatever dtype the rest is loaded in
    float32: tuple[str, ...] = ()
    # ends of names on disk: what a merge writes in the base's own dtype, because rounding sends tokens to other experts
    kept_in_merge: tuple[str, ...] = (".gate.weight", "e_score_correction_bias")
    # settings, and the path to name -> what config.json leaves out although transformers' default is another model
    missing_settings: Callable[[Settings, str], list[Problem]] = no_missing_settings
    # the share of each head that RoPE rotates, None where config.json does not say it; no check where there is no hook
    rotated_share: Callable[[Settings], float | None] | None = None
    # a pad token that is in the vocabulary and that the tokenizer's settings do not name
    unnamed_pad: str = ""
    # settings that transformers 5 writes -> what transformers 4 calls them, where it reads no other name
    older_names: Mapping[str, str] = field(default_factory=dict)
    # whether the sharded files of scripts/launch/ name this decoder layer
    in_launch_files: bool = False


def stored_as(settings: Settings) -> Dtype:
    """The dtype in which config.json says that the weights are on disk."""
    if (settings.get("quantization_config") or {}).get("quant_method") == "fp8":
        return "fp8"
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    return "float32" if str(dtype).endswith("float32") else "bfloat16"
