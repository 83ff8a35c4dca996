"""Which class a checkpoint is, what it consists of without its weights, and where its language model is.

The class is the one that the checkpoint's `architectures` names: the automatic one gives the text model alone for some
multimodal checkpoints, the whole for others, and does not list some at all.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.exceptions import ArtefactError, Problem
from utils.logger import quiet_transformers
from utils.models.directory_checks import CONFIG, readable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def settings_of(directory: Path) -> PretrainedConfig:
    """config.json as transformers reads it. Raises ArtefactError when it does not."""
    from transformers import AutoConfig

    with readable(directory):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def class_of(settings: PretrainedConfig, place: object = "") -> type[PreTrainedModel]:
    """The class named by `architectures` where it generates text, else the automatic one of causal language models.

    Raises ArtefactError, naming `place`, when there is none, for encoders and for encoder-decoders.
    """
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    fix = "give a decoder that generates text, as published for chat or completion"
    if settings.is_encoder_decoder:
        raise ArtefactError(
            Problem(f"{place}: a {settings.model_type} has an encoder, which is not adapted here", fix=fix)
        )
    # BERT and its kin have a class for text, too; without this word their layers look ahead at what is to be predicted
    if type(settings) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(settings, "is_decoder", False):
        what = f"{place}: a {settings.model_type} reads in both directions, and generates no text"
        raise ArtefactError(Problem(what, settings.architectures, fix))
    for name in settings.architectures or ():
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if is_model and kind.can_generate() and isinstance(settings, kind.config_class):
            return kind
    try:
        return _get_model_class(settings, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    except (KeyError, ValueError) as error:
        what = f"{place}: transformers has no language model for a {settings.model_type}"
        raise ArtefactError(Problem(what, settings.architectures, fix)) from error


def skeleton(directory: Path) -> PreTrainedModel:
    """The model's modules on the meta device, from its config.json alone."""
    settings = settings_of(directory)
    return without_values(settings, directory)


def without_values(settings: PretrainedConfig, place: object = "") -> PreTrainedModel:
    """The modules of the model that this configuration describes, on the meta device."""
    kind = class_of(settings, place)
    with quiet_transformers(), torch.device("meta"):
        return kind._from_config(settings)


def outline(directory: Path) -> PreTrainedModel:
    """As `skeleton`, made once for a config.json; nobody may change it."""
    return _outline(directory, (directory / CONFIG).read_bytes())


@functools.lru_cache(maxsize=8)
def _outline(directory: Path, _: bytes) -> PreTrainedModel:
    with readable(directory):
        return skeleton(directory)


def causal(model: Any) -> PreTrainedModel:
    """The model itself, without PEFT's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: Any) -> torch.nn.Module:
    """The language model without its output head; the whole model where it cannot be told from it.

    The answer of transformers, but where that is the whole model: then the part that has its input embeddings.
    """
    whole = causal(model)
    language_model = whole.get_decoder()
    if language_model is not whole:
        return language_model
    table = whole.get_input_embeddings()
    holders = [
        part for part in whole.children() if any(inner is table for inner in part.modules()) and part is not table
    ]
    return holders[0] if len(holders) == 1 else whole


def decoder_path(model: Any) -> str:
    """Where `decoder` lies in the model; empty for the whole, and for what is none of its modules."""
    language_model = decoder(model)
    return next((name for name, module in causal(model).named_modules() if module is language_model), "")


def position_table(model: Any) -> int | None:
    """How many positions a model has a table of, which is the longest row it can read; None where they are computed."""
    whole = causal(model)
    if not hasattr(whole, "config"):
        return None
    count = getattr(whole.config.get_text_config(), "max_position_embeddings", None)
    table, inside = whole.get_input_embeddings(), decoder(whole)
    tables = [m.num_embeddings for m in inside.modules() if isinstance(m, torch.nn.Embedding) and m is not table]
    # some have a few rows more, for an offset; GPT-J's rotations are a buffer
    has_one = any(0 <= rows - (count or 0) <= 8 for rows in tables) or any(count in b.shape for b in inside.buffers())
    return int(count) if count and has_one else None


def longest_row(directory: Path, tokens: int) -> int:
    """So many tokens, or as many as the model has positions for."""
    return min(tokens, position_table(outline(directory)) or tokens)
