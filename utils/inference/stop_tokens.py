"""The tokens that end an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.models import turn_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def of(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """Every token at which generation stops: the end of a turn, eos, and what the model's own configuration names."""
    named = getattr(generation_config, "eos_token_id", None)
    listed = named if isinstance(named, (list, tuple)) else [] if named is None else [named]
    return sorted({turn_format.of(tokenizer).end[-1], int(tokenizer.eos_token_id), *map(int, listed)})
