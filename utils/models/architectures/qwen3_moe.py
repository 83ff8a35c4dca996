"""Qwen3-MoE: sizes with dense layers between the sparse ones, routers in the model's dtype, a default that misleads.

Read off transformers 5.23: queries and keys are normalised head by head, experts have a width of their own
(`moe_intermediate_size`), and layers of `mlp_only_layers`, or off `decoder_sparse_step`, are dense. The router is
computed in the dtype of the activations, here as in servers, so it is merged like every other weight.
"""

from __future__ import annotations

from utils.exceptions import Problem
from utils.models.architectures.architecture import Architecture, Settings, stored_as
from utils.models.model_shapes import Matrix, ModelSizes


def sizes(settings: Settings) -> ModelSizes:
    """The sizes that follow from a Qwen3-MoE's config.json. Raises KeyError for a setting that is missing."""
    layers, hidden = settings["num_hidden_layers"], settings["hidden_size"]
    # published files say num_experts, those that transformers 5 writes num_local_experts
    experts = settings["num_local_experts"] if "num_local_experts" in settings else settings["num_experts"]
    sparse = sum(_is_sparse(settings, layer, experts) for layer in range(layers))
    inner, wide, dense = settings["moe_intermediate_size"], settings["intermediate_size"], layers - sparse
    heads = settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or hidden // heads
    query, key = heads * head_dim, settings["num_key_value_heads"] * head_dim
    table = settings["vocab_size"] * hidden
    attention = (
        Matrix("q_proj", query, hidden, layers),
        Matrix("k_proj", key, hidden, layers),
        Matrix("v_proj", key, hidden, layers),
        Matrix("o_proj", hidden, query, layers),
    )
    plain = (
        Matrix("gate_proj", wide, hidden, dense),
        Matrix("up_proj", wide, hidden, dense),
        Matrix("down_proj", hidden, wide, dense),
    )
    fused = (
        Matrix("gate_up_proj", 2 * inner, hidden, sparse * experts, is_experts=True),
        Matrix("down_proj", hidden, inner, sparse * experts, is_experts=True),
    )
    biases = layers * (query + 2 * key + hidden) if settings.get("attention_bias") else 0
    parameters = {
        "embeddings": table,
        "head": 0 if settings.get("tie_word_embeddings") else table,
        "attention": sum(matrix.parameters for matrix in attention) + biases,
        "router": sparse * experts * hidden,
        "experts": sum(matrix.parameters for matrix in fused),
        "dense": sum(matrix.parameters for matrix in plain),
        "norms": layers * (2 * hidden + 2 * head_dim) + hidden,  # one norm for all heads of a layer
        "other": 0,
    }
    everywhere = (parameters["attention"] + parameters["norms"] - hidden) // layers
    in_sparse = (parameters["router"] + parameters["experts"]) // sparse if sparse else 0
    return ModelSizes(
        model_type="qwen3_moe",
        layer_class="Qwen3MoeDecoderLayer",
        parameters=parameters,
        matrices=tuple(matrix for matrix in (*attention, *plain, *fused) if matrix.copies),
        num_layers=layers,
        layer_parameters=everywhere + max(in_sparse, parameters["dense"] // dense if dense else 0),
        hidden=hidden,
        query=query,
        key=key,
        heads=heads,
        intermediate=inner if sparse else wide,
        vocabulary=settings["vocab_size"],
        experts=experts if sparse else 0,
        experts_per_token=settings["num_experts_per_tok"] if sparse else 0,
        expert_plan=sparse > 0,
        has_qk_norm=True,
        stored=stored_as(settings),
    )


def missing_settings(settings: Settings, place: str) -> list[Problem]:
    """Without `norm_topk_prob` transformers leaves the chosen experts' weights as they are, without a word."""
    if settings.get("norm_topk_prob") is not None:
        return []
    what = (
        f"{place} has no norm_topk_prob: experts' weights would not be made to add up to 1, and every answer be wrong"
    )
    return [Problem(what, fix='restore it: Qwen publishes its Qwen3-MoE models with "norm_topk_prob": true')]


def _is_sparse(settings: Settings, layer: int, experts: int) -> bool:
    step = settings.get("decoder_sparse_step") or 1
    return layer not in (settings.get("mlp_only_layers") or ()) and experts > 0 and (layer + 1) % step == 0


OLDER = {"num_local_experts": "num_experts"}
ARCHITECTURE = Architecture(sizes=sizes, missing_settings=missing_settings, kept_in_merge=(), older_names=OLDER)
