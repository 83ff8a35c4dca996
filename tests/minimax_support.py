"""Tiny MiniMax-M2 checkpoints as the real one is published, in bfloat16 and FP8; FP8 products on a CPU. No tests here.

Names, dtypes and config.json are those of MiniMaxAI/MiniMax-M2: routers in float32, a tensor for each matrix of each
expert, `rotary_dim` and `rope_theta` at the top of config.json, an `auto_map` to code that is not fetched.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from config import BaseModelSection
from tests.support import temporary_directory
from utils import logger
from utils.models import loading, sources
from utils.models.architectures import toy
from utils.models.base_model import BaseModel
from utils.models.weights import fp8

Kind = Literal["bfloat16", "fp8"]
BLOCK = (128, 128)
FLOAT32 = ("block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias")
QUANTISATION = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "float8_e4m3fn",
    "weight_block_size": list(BLOCK),
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}
# what the published config.json has and transformers does not write
PUBLISHED = {
    "auto_map": {
        "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
        "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
    },
    "attn_type_list": [1, 1],
    "mtp_transformer_layers": 1,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "rope_theta": 5_000_000,
    "scoring_func": "sigmoid",
    "use_qk_norm": True,
    "use_routing_bias": True,
}


@functools.cache
def checkpoint(kind: Kind) -> Path:
    """A model directory of two files; every call gives the same one, so copy it before changing it."""
    directory = temporary_directory() / f"tiny-minimax-m2-{kind}"
    model, tokenizer = toy.tiny_minimax_m2(hidden=128, head=64)
    with logger.quiet_transformers():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if kind == "fp8" and ("_proj." in name or ".experts." in name):
            whole[name], whole[f"{name}_scale_inv"] = fp8.quantise(tensor, BLOCK)
        else:
            whole[name] = tensor if name.endswith(FLOAT32) else tensor.bfloat16()
    (directory / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + ('layers.1.' in name)}-of-00002.safetensors" for name in whole}
    for file in set(where.values()):
        save_file({n: t for n, t in whole.items() if where[n] == file}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in whole.values())}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = json.loads((directory / "config.json").read_text()) | PUBLISHED | {"dtype": "bfloat16"}
    del settings["rope_parameters"]
    settings |= {"quantization_config": QUANTISATION} if kind == "fp8" else {}
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def section(kind: Kind, **more: Any) -> BaseModelSection:
    return BaseModelSection(**{"source": str(checkpoint(kind)), "dtype": "bfloat16", **more})


def fetched(kind: Kind) -> BaseModel:
    return sources.fetch(section(kind), temporary_directory())


@contextmanager
def fp8_on_this_cpu() -> Iterator[None]:
    """transformers loads FP8 and multiplies with it as on a GPU that can: weights are de-quantised in each product.

    This shows what is trained and what is not; it says nothing about the kernels' numerics or speed.
    """
    from transformers.integrations import finegrained_fp8
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block: Any, *_: Any) -> torch.Tensor:
        return torch.nn.functional.linear(x, finegrained_fp8._dequantize_fp8_weight(weight, scale, block, x.dtype))

    with (
        mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment"),
        mock.patch.object(finegrained_fp8, "fp8_linear", product),
    ):
        yield


def load_native_fp8(**more: Any) -> torch.nn.Module:
    """The FP8 checkpoint loaded as FP8, by us; use within `fp8_on_this_cpu`."""
    model = loading.load_model(fetched("fp8"), section("fp8", **more), native_fp8=True)
    model.set_experts_implementation("eager")  # the grouped kernels take a GPU
    return model
