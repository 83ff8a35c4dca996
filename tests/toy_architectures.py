"""Toy checkpoints of the architectures that the support matrix is about, built with transformers' own classes.

Weights are random and large enough that every part of a model matters. `build(name, directory)` writes a checkpoint as
`save_pretrained` does, so with the hub's names of the tensors, and a tokenizer with a chat template.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.toy_specs import SPECS, VOCABULARY
from utils import logger

CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The toy model of an architecture, random."""
    settings, kind = SPECS[name]
    with logger.quiet_transformers():
        torch.manual_seed(seed)
        # a recurrence of larger weights makes much of float32 rounding
        made = awake(getattr(T, kind)(settings()), 2.0 if name == "mamba" else 4.0)
    if name == "gemma3n_text":  # its gradient is NaN where an embedding is zero, as that of the pad token is at first
        for parameter in made.parameters():
            if len(parameter) == VOCABULARY:
                parameter.data[2] = parameter.data[3].flip(0)
    return made.to(dtype)


def build(name: str, directory: Path, *, template: str = CHATML, seed: int = 0) -> Path:
    """Write the checkpoint of an architecture to `directory`; returns it."""
    with logger.quiet_transformers():
        model(name, seed).save_pretrained(directory)
        tokenizer(template).save_pretrained(directory)
    return directory


def tokenizer(template: str = CHATML, **special: str) -> T.PreTrainedTokenizerFast:
    """A byte-level tokenizer of 640 tokens whose end of turn is `<|im_end|>`, id 1."""
    found = T.PreTrainedTokenizerFast.from_pretrained(_tokenizer_files(tuple(sorted(special.items()))))
    found.chat_template = template
    return found


@functools.cache
def _tokenizer_files(special: tuple[tuple[str, str], ...]) -> str:
    from tests.support import temporary_directory

    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    named |= dict(special)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=list(dict.fromkeys([*named.values(), "<|im_start|>", "<|im_end|>"])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([inspect.getsource(module) for module in (json, statistics, argparse)], trainer)
    directory = str(temporary_directory())
    T.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **named).save_pretrained(directory)
    return directory


def awake(made: Any, size: float = 4.0) -> Any:
    """Random weights large enough that every part of the model matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2 and name.endswith(".weight") and not parameter.any():  # as xLSTM's gates begin
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim > 1:
                parameter.mul_(10.0 if "embed" in name or "wte" in name else size)
            elif "bias" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "sinks" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif "output_scale" in name:
                parameter.fill_(0.7)
        for name, buffer in made.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return made
