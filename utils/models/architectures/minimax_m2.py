"""MiniMax-M2: built-in shapes, routers in float32, half of each head rotated, a pad token that nothing names.

`PUBLISHED` is the shape part of the config.json of MiniMaxAI/MiniMax-M2 as it was published at the revision that
config.py pins (rotary_dim 64 of head_dim 128; checkpoint in FP8 with blocks of 128). The real classes are counted on
the meta device by `utils/planning/memory/count_parameters.py`; tests/test_planning_estimates.py holds the two together.
"""

from __future__ import annotations

from typing import Any

from config import is_minimax_m2
from utils.exceptions import Problem
from utils.models.architectures.architecture import Architecture, PublishedModel, Settings, stored_as
from utils.models.model_shapes import Matrix, ModelSizes

PUBLISHED: dict[str, Any] = {
    "model_type": "minimax_m2",
    "num_hidden_layers": 62,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 5_000_000,
    "max_position_embeddings": 196_608,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "vocab_size": 200_064,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "float8_e4m3fn",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
}


def sizes(settings: Settings) -> ModelSizes:
    """The sizes that follow from a MiniMax-M2's config.json. Raises KeyError for a setting that is missing."""
    layers, hidden = settings["num_hidden_layers"], settings["hidden_size"]
    inner, experts = settings["intermediate_size"], settings["num_local_experts"]
    heads, head_dim = settings["num_attention_heads"], settings["head_dim"]
    query, key = heads * head_dim, settings["num_key_value_heads"] * head_dim
    table = settings["vocab_size"] * hidden
    attention = (
        Matrix("q_proj", query, hidden, layers),
        Matrix("k_proj", key, hidden, layers),
        Matrix("v_proj", key, hidden, layers),
        Matrix("o_proj", hidden, query, layers),
    )
    fused = (
        Matrix("gate_up_proj", 2 * inner, hidden, layers * experts, is_experts=True),
        Matrix("down_proj", hidden, inner, layers * experts, is_experts=True),
    )
    parameters = {
        "embeddings": table,
        "head": 0 if settings.get("tie_word_embeddings") else table,
        "attention": sum(matrix.parameters for matrix in attention),
        "router": layers * experts * hidden,
        "experts": sum(matrix.parameters for matrix in fused),
        "dense": 0,
        "norms": layers * (2 * hidden + query + key) + hidden,  # queries and keys are normalised over all heads
        "other": 0,
    }
    in_layers = sum(parameters[kind] for kind in ("attention", "router", "experts", "norms")) - hidden
    return ModelSizes(
        model_type="minimax_m2",
        layer_class="MiniMaxM2DecoderLayer",
        parameters=parameters,
        matrices=(*attention, *fused),
        num_layers=layers,
        layer_parameters=in_layers // layers,
        hidden=hidden,
        query=query,
        key=key,
        heads=heads,
        intermediate=inner,
        vocabulary=settings["vocab_size"],
        experts=experts,
        experts_per_token=settings["num_experts_per_tok"],
        expert_plan=True,
        has_qk_norm=True,
        float32_router=True,
        stored=stored_as(settings),
    )


def rotated_share(settings: Settings) -> float | None:
    """The share of each head that RoPE rotates, as config.json says it; None where it does not."""
    for place in (settings, settings.get("rope_parameters") or {}):
        if place.get("partial_rotary_factor") is not None:
            return float(place["partial_rotary_factor"])
    if settings.get("rotary_dim") is not None and settings.get("head_dim"):
        return settings["rotary_dim"] / settings["head_dim"]
    return None


def missing_settings(settings: Settings, place: str) -> list[Problem]:
    """Where config.json does not say how much of a head is rotated, it is rotated whole, without a word."""
    if rotated_share(settings) is not None:
        return []
    what = f"{place} has no rotary_dim: whole heads would be rotated, and every answer be wrong"
    return [Problem(what, fix='restore it: MiniMax-M2 has "rotary_dim": 64 beside "head_dim": 128')]


def _is_published(source: str) -> bool:
    return is_minimax_m2(source) and not source.startswith("toy:")


ARCHITECTURE = Architecture(
    sizes=sizes,
    published=PublishedModel("MiniMax-M2", PUBLISHED, _is_published, preset="minimax_m2"),
    # a bfloat16 router sent 3% of tokens to other experts, and servers keep it in float32
    float32=("mlp.gate.weight", "mlp.e_score_correction_bias"),
    missing_settings=missing_settings,
    rotated_share=rotated_share,
    unnamed_pad="]!p~[",
    in_launch_files=True,
)
