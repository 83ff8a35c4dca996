"""A model's shapes from its own config.json, by building it on the meta device: exact, and no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from utils.models.architectures import registry
from utils.models.model_shapes import Matrix, ModelSizes
from utils.models.weights.tensor_names import decoder_list, number_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig


KINDS = ("embeddings", "head", "attention", "router", "experts", "dense", "norms", "other")


def of_settings(settings: Mapping[str, Any]) -> ModelSizes:
    """The shapes that a config.json describes. Raises ValueError, KeyError or AttributeError for what is not known."""
    from transformers import AutoConfig

    return of_config(AutoConfig.for_model(**settings))


def of_config(settings: PretrainedConfig) -> ModelSizes:
    """The shapes of the model that transformers would build from this configuration."""
    from transformers import AutoModelForCausalLM

    from utils.logger import quiet_transformers

    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    text = settings.get_text_config()
    parameters, layers = Counter(), Counter()
    path = decoder_list((name for name, _ in model.named_parameters()), int(text.num_hidden_layers))
    for name, parameter in model.named_parameters():
        parameters[_kind(name, path)] += parameter.numel()
        if (layer := number_in(path, name)) is not None:
            layers[layer] += parameter.numel()
    matrices = _matrices(model)
    heads = int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    down = [matrix for matrix in matrices if matrix.name == "down_proj"]
    fused = [parameter for name, parameter in model.named_parameters() if _is_fused(name, parameter)]
    quantisation = getattr(settings, "quantization_config", None) or {}
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    return ModelSizes(
        model_type=settings.model_type,
        layer_class=type(model.get_decoder().layers[0]).__name__,
        parameters={kind: parameters[kind] for kind in KINDS},
        matrices=matrices,
        num_layers=len(layers),
        layer_parameters=max(layers.values()),
        hidden=int(text.hidden_size),
        query=heads * head_dim,
        key=key_heads * head_dim,
        heads=heads,
        intermediate=(next((m for m in down if m.is_experts), None) or down[0]).in_features,
        vocabulary=int(text.vocab_size),
        experts=fused[0].shape[0] if fused else 0,
        experts_per_token=int(text.num_experts_per_tok) if fused else 0,
        has_qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        float32_router=bool(registry.of(settings.model_type).float32),
        stored="fp8" if method == "fp8" else "float32" if str(settings.dtype).endswith("float32") else "bfloat16",
    )


def _kind(name: str, layers: str) -> str:
    if "norm" in name:
        return "norms"
    if number_in(layers, name) is None:
        return "embeddings" if "embed" in name else "head" if "lm_head" in name else "other"
    if ".experts." in name:
        return "experts"
    if ".gate." in name or ".router." in name:
        return "router"
    return "attention" if "attn" in name or "attention" in name else "dense" if "mlp" in name else "other"


def _is_fused(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter holds a matrix (O, I) for each of its E experts."""
    return parameter.ndim == 3 and ".experts." in name


def _matrices(model: torch.nn.Module) -> tuple[Matrix, ...]:
    found: Counter[tuple[str, int, int, bool]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] != "lm_head":
            found[(name.rpartition(".")[2], *module.weight.shape, False)] += 1
    for name, parameter in model.named_parameters():
        if _is_fused(name, parameter):
            found[(name.rpartition(".")[2], *parameter.shape[1:], True)] += math.prod(parameter.shape[:1])
    return tuple(Matrix(name, out, inside, copies, fused) for (name, out, inside, fused), copies in found.items())
