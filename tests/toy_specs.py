"""Small configurations of the architectures that the support matrix is about, by transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as T

VOCABULARY = 640
_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SIZES: dict[str, Any] = {
    **_IDS,
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_DENSE: dict[str, Any] = {**_SIZES, "intermediate_size": 96}
_OLD: dict[str, Any] = {**_IDS, "vocab_size": VOCABULARY}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LATENT: dict[str, Any] = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
_DELTA_NET: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}


def _text(kind: str, **sizes: Any) -> dict[str, Any]:
    """A language model's part of a multimodal configuration."""
    return getattr(T, kind)(**{**_DENSE, **sizes}).to_dict()


def _of(kind: str, base: dict[str, Any] = _DENSE, **sizes: Any) -> Callable[[], Any]:
    return lambda: getattr(T, kind)(**{**base, **sizes})


_SIGLIP: dict[str, Any] = {**_VISION, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
_QWEN_EYE: dict[str, Any] = {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_LINES = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name -> (configuration, class), as the published models of that family have them
SPECS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (_of("LlamaConfig"), "LlamaForCausalLM"),
    "llama3": (_of("LlamaConfig", rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True), "LlamaForCausalLM"),
    "mistral": (_of("MistralConfig", sliding_window=None), "MistralForCausalLM"),
    "ministral3": (_of("Ministral3Config"), "Ministral3ForCausalLM"),
    "qwen2": (_of("Qwen2Config", tie_word_embeddings=True), "Qwen2ForCausalLM"),
    "qwen3": (_of("Qwen3Config", head_dim=16, tie_word_embeddings=True), "Qwen3ForCausalLM"),
    "smollm3": (_of("SmolLM3Config"), "SmolLM3ForCausalLM"),
    "phi": (_of("PhiConfig"), "PhiForCausalLM"),
    "phi3": (_of("Phi3Config"), "Phi3ForCausalLM"),
    "gemma2": (_of("Gemma2Config", **_GEMMA), "Gemma2ForCausalLM"),
    "gemma3_text": (_of("Gemma3TextConfig", **_GEMMA), "Gemma3ForCausalLM"),
    "gemma4_text": (_of("Gemma4TextConfig", head_dim=16), "Gemma4ForCausalLM"),
    "granite": (
        _of("GraniteConfig", embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.5),
        "GraniteForCausalLM",
    ),
    "cohere": (_of("CohereConfig"), "CohereForCausalLM"),
    "olmo3": (_of("Olmo3Config"), "Olmo3ForCausalLM"),
    "nemotron": (_of("NemotronConfig"), "NemotronForCausalLM"),
    "starcoder2": (_of("Starcoder2Config"), "Starcoder2ForCausalLM"),
    "gpt_neox": (
        _of("GPTNeoXConfig", {k: v for k, v in _DENSE.items() if k != "num_key_value_heads"}),
        "GPTNeoXForCausalLM",
    ),
    "gpt2": (_of("GPT2Config", _OLD, n_embd=64, n_layer=2, n_head=4, n_positions=512), "GPT2LMHeadModel"),
    "gptj": (_of("GPTJConfig", _OLD, n_embd=64, n_layer=2, n_head=4, n_positions=512, rotary_dim=8), "GPTJForCausalLM"),
    "bloom": (_of("BloomConfig", _OLD, hidden_size=64, n_layer=2, n_head=4), "BloomForCausalLM"),
    "falcon": (
        _of("FalconConfig", _OLD, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
        "FalconForCausalLM",
    ),
    "opt": (
        _of(
            "OPTConfig",
            _OLD,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            word_embed_proj_dim=64,
        ),
        "OPTForCausalLM",
    ),
    "mixtral": (_of("MixtralConfig", **_LOCAL), "MixtralForCausalLM"),
    "minimax_m2": (
        _of("MiniMaxM2Config", _SIZES, intermediate_size=64, head_dim=16, rotary_dim=8, **_LOCAL),
        "MiniMaxM2ForCausalLM",
    ),
    "phimoe": (_of("PhimoeConfig", **_LOCAL), "PhimoeForCausalLM"),
    "granitemoe": (_of("GraniteMoeConfig", **_LOCAL), "GraniteMoeForCausalLM"),
    "olmoe": (_of("OlmoeConfig", **_LINES), "OlmoeForCausalLM"),
    "qwen2_moe": (_of("Qwen2MoeConfig", **_EXPERTS, shared_expert_intermediate_size=96), "Qwen2MoeForCausalLM"),
    "qwen3_moe": (_of("Qwen3MoeConfig", head_dim=16, norm_topk_prob=True, **_EXPERTS), "Qwen3MoeForCausalLM"),
    "glm4_moe": (
        _of(
            "Glm4MoeConfig",
            head_dim=16,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            use_qk_norm=True,
            attention_bias=True,
            **_ROUTED,
        ),
        "Glm4MoeForCausalLM",
    ),
    "deepseek_v2": (_of("DeepseekV2Config", n_group=1, **_LATENT), "DeepseekV2ForCausalLM"),
    "deepseek_v3": (_of("DeepseekV3Config", n_group=2, **_LATENT), "DeepseekV3ForCausalLM"),
    "gpt_oss": (_of("GptOssConfig", head_dim=16, sliding_window=64, **_LOCAL), "GptOssForCausalLM"),
    "llama4_text": (
        _of("Llama4TextConfig", intermediate_size_mlp=96, head_dim=16, num_local_experts=4, num_experts_per_tok=1),
        "Llama4ForCausalLM",
    ),
    "qwen3_next": (
        _of("Qwen3NextConfig", shared_expert_intermediate_size=48, **_EXPERTS, **_DELTA_NET),
        "Qwen3NextForCausalLM",
    ),
    "qwen3_5_text": (_of("Qwen3_5TextConfig", **_DELTA_NET), "Qwen3_5ForCausalLM"),
    "lfm2": (_of("Lfm2Config", layer_types=["conv", "full_attention"]), "Lfm2ForCausalLM"),
    "jamba": (
        _of(
            "JambaConfig",
            num_experts=2,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        ),
        "JambaForCausalLM",
    ),
    "falcon_h1": (
        _of(
            "FalconH1Config",
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_d_state=16,
            mamba_expand=1,
        ),
        "FalconH1ForCausalLM",
    ),
    "mamba": (_of("MambaConfig", _OLD, hidden_size=64, num_hidden_layers=2, state_size=8), "MambaForCausalLM"),
    "recurrent_gemma": (
        _of(
            "RecurrentGemmaConfig",
            {k: v for k, v in _DENSE.items() if k != "max_position_embeddings"},
            intermediate_size=192,
            num_hidden_layers=3,
            num_key_value_heads=1,
            lru_width=64,
            attention_window_size=64,
        ),
        "RecurrentGemmaForCausalLM",
    ),
    # layers that look alike, every second one with a window
    "gpt_neo": (
        _of(
            "GPTNeoConfig",
            _OLD,
            hidden_size=64,
            intermediate_size=96,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=512,
            window_size=32,
        ),
        "GPTNeoForCausalLM",
    ),
    # two attention and two dense blocks in each layer, and experts that do nothing
    "longcat_flash": (
        _of(
            "LongcatFlashConfig",
            {k: v for k, v in _SIZES.items() if k not in ("num_hidden_layers", "num_key_value_heads")},
            num_layers=2,
            ffn_hidden_size=96,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            head_dim=8,
            v_head_dim=16,
            moe_topk=2,
            n_routed_experts=4,
            zero_expert_num=2,
            expert_ffn_hidden_size=48,
            routed_scaling_factor=1.5,
        ),
        "LongcatFlashForCausalLM",
    ),
    "granitemoehybrid": (
        _of(
            "GraniteMoeHybridConfig",
            layer_types=["mamba", "attention"],
            shared_intermediate_size=48,
            mamba_n_heads=8,
            mamba_n_groups=1,
            mamba_d_state=16,
            mamba_d_head=16,
            mamba_expand=2,
            **_LOCAL,
        ),
        "GraniteMoeHybridForCausalLM",
    ),
    "dbrx": (
        _of(
            "DbrxConfig",
            _OLD,
            d_model=64,
            n_heads=4,
            n_layers=2,
            max_seq_len=512,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        ),
        "DbrxForCausalLM",
    ),
    # attention over experts; the router is a neighbour of the stacked matrices
    "jetmoe": (
        _of(
            "JetMoeConfig",
            {k: v for k, v in _DENSE.items() if k != "num_attention_heads"},
            kv_channels=16,
            **_LOCAL,
        ),
        "JetMoeForCausalLM",
    ),
    # the layers are counted by the list of their kinds
    "nemotron_h": (
        _of(
            "NemotronHConfig",
            {k: v for k, v in _DENSE.items() if k != "num_hidden_layers"},
            layers_block_type=["mamba", "attention", "mlp", "moe"],
            head_dim=16,
            ssm_state_size=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=1,
            chunk_size=32,
            use_mamba_kernels=False,
            moe_shared_expert_intermediate_size=48,
            **_ROUTED,
        ),
        "NemotronHForCausalLM",
    ),
    # a block without gradients chooses the tokens that attention sees
    "deepseek_v32": (
        _of(
            "DeepseekV32Config",
            n_group=2,
            index_topk=32,
            index_head_dim=16,
            index_n_heads=16,
            **_LATENT,
        ),
        "DeepseekV32ForCausalLM",
    ),
    # the number of layers in two words, and modules without a gradient
    "xlstm": (
        _of("xLSTMConfig", _OLD, hidden_size=128, num_hidden_layers=2, num_heads=4, chunk_size=16),
        "xLSTMForCausalLM",
    ),
    # layers that share their weights
    "zamba2": (
        _of(
            "Zamba2Config",
            {k: v for k, v in _DENSE.items() if k != "num_hidden_layers"},
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            mamba_d_state=16,
            mamba_ngroups=1,
            n_mamba_heads=8,
            use_mamba_kernels=False,
            adapter_rank=8,
            chunk_size=32,
            use_mem_rope=True,
        ),
        "Zamba2ForCausalLM",
    ),
    # streams beside the residual one; a pad token without an embedding has no gradient
    "gemma3n_text": (
        _of(
            "Gemma3nTextConfig",
            {k: v for k, v in _DENSE.items() if k not in ("num_hidden_layers", "intermediate_size")},
            num_hidden_layers=4,
            intermediate_size=[96] * 4,
            head_dim=16,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"] * 2,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=16,
            altup_num_inputs=2,
            num_kv_shared_layers=2,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        "Gemma3nForCausalLM",
    ),
    "gemma3": (
        lambda: T.Gemma3Config(
            text_config=_text("Gemma3TextConfig", **_GEMMA),
            vision_config={**_SIGLIP, "patch_size": 14},
            mm_tokens_per_image=4,
        ),
        "Gemma3ForConditionalGeneration",
    ),
    "mistral3": (
        lambda: T.Mistral3Config(
            text_config=_text("MistralConfig", head_dim=16, sliding_window=None),
            vision_config={**_SIGLIP, "patch_size": 14, "head_dim": 16, "model_type": "pixtral"},
        ),
        "Mistral3ForConditionalGeneration",
    ),
    "qwen2_5_vl": (
        lambda: T.Qwen2_5_VLConfig(
            text_config={**_DENSE, "rope_parameters": _MROPE},
            vision_config={**_QWEN_EYE, "fullatt_block_indexes": [0]},
        ),
        "Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3_5": (
        lambda: T.Qwen3_5Config(
            text_config=_text("Qwen3_5TextConfig", **_DELTA_NET),
            vision_config={**_QWEN_EYE, "num_position_embeddings": 16},
        ),
        "Qwen3_5ForConditionalGeneration",
    ),
    "qwen3_5_moe": (
        lambda: T.Qwen3_5MoeConfig(
            text_config=_text("Qwen3_5MoeTextConfig", shared_expert_intermediate_size=48, **_EXPERTS, **_DELTA_NET),
            vision_config={**_QWEN_EYE, "num_position_embeddings": 16},
        ),
        "Qwen3_5MoeForConditionalGeneration",
    ),
}
