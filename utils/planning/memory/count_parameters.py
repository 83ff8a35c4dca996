"""A model's shapes from its own config.json, by building it on the meta device: exact, and no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from utils.models.architectures import registry
from utils.models.model_shapes import Matrix, ModelSizes
from utils.models.parallel import expert_parallel
from utils.models.structure import linear_modules, model_class
from utils.models.weights.tensor_names import decoder_list, number_in, transposed_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig


KINDS = ("embeddings", "head", "attention", "router", "experts", "dense", "norms", "other")


def of_settings(settings: Mapping[str, Any]) -> ModelSizes:
    """The shapes that a config.json describes. Raises whatever comes up in a model that it does not understand."""
    from transformers import AutoConfig, PreTrainedConfig

    # transformers writes an infinite number as {"__float__": "Infinity"}
    return of_config(AutoConfig.for_model(**PreTrainedConfig._decode_special_floats(dict(settings))))


def of_config(settings: PretrainedConfig) -> ModelSizes:
    """The shapes of the model that transformers would build from this configuration."""
    model = model_class.without_values(settings)
    text = settings.get_text_config()
    parameters, layers = Counter(), Counter()
    path = decoder_list((name for name, _ in model.named_parameters()), int(text.num_hidden_layers))
    for name, parameter in model.named_parameters():
        parameters[_kind(name, path)] += parameter.numel()
        if (layer := number_in(path, name)) is not None:
            layers[layer] += parameter.numel()
    matrices = _matrices(model)
    heads = int(text.num_attention_heads)
    head_dim = int(_setting(text, "head_dim") or text.hidden_size // heads)
    key_heads = int(_setting(text, "num_key_value_heads") or heads)
    down = [matrix for matrix in matrices if matrix.name == "down_proj"] or _into_hidden(
        matrices, int(text.hidden_size)
    )
    fused = [parameter for name, parameter in model.named_parameters() if _is_fused(name, parameter)]
    quantisation = getattr(settings, "quantization_config", None) or {}
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    return ModelSizes(
        model_type=settings.model_type,
        layer_class=_layer_class(model),
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
        experts_per_token=_experts_per_token(text) if fused else 0,
        expert_plan=bool(fused) and bool(expert_parallel.modules(model)),
        has_qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        float32_router=bool(registry.of(settings.model_type).float32),
        stored="fp8" if method == "fp8" else "float32" if str(settings.dtype).endswith("float32") else "bfloat16",
    )


def _setting(text: PretrainedConfig, name: str) -> Any:
    """A setting; the one of config.json where layers differ in it (Gemma 4), which transformers refuses to say."""
    try:
        return getattr(text, name, None)
    except RuntimeError:
        return text.to_dict().get(name)


def _into_hidden(matrices: tuple[Matrix, ...], hidden: int) -> list[Matrix]:
    """The matrices that lead back into the hidden states, the widest first: an MLP's, whatever it is called."""
    leading = [matrix for matrix in matrices if matrix.adaptable and matrix.out_features == hidden]
    return sorted(leading, key=lambda matrix: matrix.in_features, reverse=True)


def _layer_class(model: torch.nn.Module) -> str:
    """The class of the decoder's layers: those of its longest list of modules."""
    lists = [m for m in model_class.decoder(model).modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    return type(max(lists, key=len)[0]).__name__


def _experts_per_token(text: PretrainedConfig) -> int:
    return int(
        next(getattr(text, n) for n in ("num_experts_per_tok", "num_experts_per_token", "top_k") if hasattr(text, n))
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
    counts: Counter[tuple[str, int, int, bool, bool]] = Counter()
    adaptable, transposed = set(linear_modules.adaptable(model)), transposed_parameters(model)
    for name, module in model.named_modules():
        if linear_modules.is_linear(module) and module is not model.get_output_embeddings():
            weight_OI = module.weight.mT if f"{name}.weight" in transposed else module.weight
            counts[(name.rpartition(".")[2], *weight_OI.shape, False, name in adaptable)] += 1
    for name, parameter in model.named_parameters():
        if _is_fused(name, parameter):
            shape_OI = (parameter.mT if name in transposed else parameter).shape[1:]
            counts[(name.rpartition(".")[2], *shape_OI, True, True)] += math.prod(parameter.shape[:1])
    return tuple(
        Matrix(name, out, inside, copies, fused, can) for (name, out, inside, fused, can), copies in counts.items()
    )
