"""What a loading library may get wrong without a word: a router in another precision, full RoPE, another number format.

MiniMax-M2 is the reason. transformers 5.23 loads its float32 router as bfloat16 (3% of tokens then go to other
experts, and servers keep float32), rotates whole heads where config.json lacks `rotary_dim`, and de-quantises an FP8
checkpoint on a GPU that cannot multiply FP8.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.exceptions import Problem
from utils.models.architectures import registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMED = 3


def problems(model: PreTrainedModel, directory: Path, *, native_fp8: bool = False) -> list[Problem]:
    """Everything in which the loaded model is not what its files say; empty when it is."""
    return [
        *_narrow_routers(model, directory),
        *_wrong_rotation(model, directory),
        *_wrong_format(model, directory, native_fp8=native_fp8),
    ]


def _narrow_routers(model: PreTrainedModel, directory: Path) -> list[Problem]:
    ends = registry.of(model.config.model_type).float32
    narrow = [
        f"{name} {tensor.dtype}"
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if ends and name.endswith(ends) and tensor.dtype != torch.float32
    ]
    what = f"{directory}: {len(narrow)} router tensors were not loaded as float32: tokens would go to other experts"
    return [Problem(what, narrow[:NAMED], "use the transformers of requirements.txt")] if narrow else []


def _wrong_rotation(model: PreTrainedModel, directory: Path) -> list[Problem]:
    settings = model.config.to_dict()
    rotated_share = registry.of(settings.get("model_type")).rotated_share
    if rotated_share is None:
        return []
    share = rotated_share(settings)
    (rotation,) = (module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    rotated, expected = 2 * len(rotation.inv_freq), round((1.0 if share is None else share) * settings["head_dim"])
    if share is not None and rotated == expected:
        return []
    what = f"{directory}: {rotated} of the {settings['head_dim']} values of a head are rotated, its config.json says "
    return [Problem(what + ("nothing" if share is None else str(expected)), fix="restore rotary_dim in config.json")]


def _wrong_format(model: PreTrainedModel, directory: Path, *, native_fp8: bool) -> list[Problem]:
    codes = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn]
    if native_fp8 and not codes:
        what = f"{directory}: its weights were to stay FP8, and transformers de-quantised them"
        return [Problem(what, fix="--base.fp8 dequantise, where the memory is there")]
    if codes and not native_fp8:
        what = f"{directory}: {len(codes)} weights are FP8 values and should be dequantized"
        return [Problem(what, codes[:NAMED], "use the transformers of requirements.txt")]
    return []
