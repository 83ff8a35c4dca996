"""Real architectures at toy size, with random weights: what tests and the tiny preset run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MiniMaxM2ForCausalLM, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

# MiniMax-M2's own special tokens, and the behaviour of its template: it always opens a think block for generation, and
# writes tools, their calls and results
SPECIAL = {"bos_token": "]~!b[", "eos_token": "[e~[", "pad_token": "]!p~[", "unk_token": "]!d~["}
MARKERS = ("]~b]", "<think>", "</think>")
TEMPLATE = """\
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- ']~!b[' -}}
{%- if messages[0].role != 'system' -%}{{- ']~b]system\\nYou are a helpful assistant.[e~[\\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- set before = messages[loop.index0 - 1].role if loop.index0 else '' -%}
{%- set after = messages[loop.index0 + 1].role if not loop.last else '' -%}
{%- if m.role == 'assistant' -%}
{{- ']~b]ai\\n' -}}
{%- if loop.index0 > ns.last_user and m.reasoning_content -%}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content.split('</think>')[-1].strip('\\n') -}}
{%- if m.tool_calls -%}
{{- '\\n<minimax:tool_call>\\n' -}}
{%- for call in m.tool_calls -%}
{{- '<invoke name="' + call.function.name + '">\\n' -}}
{%- for key, value in call.function.arguments.items() -%}
{{- '<parameter name="' + key + '">' + (value if value is string else value | tojson) + '</parameter>\\n' -}}
{%- endfor -%}{{- '</invoke>\\n' -}}
{%- endfor -%}{{- '</minimax:tool_call>' -}}
{%- endif -%}{{- '[e~[\\n' -}}
{%- elif m.role == 'tool' -%}
{{- (']~b]tool' if before != 'tool' else '') + '\\n<response>' + m.content + '</response>' -}}
{{- '[e~[\\n' if after != 'tool' else '' -}}
{%- else -%}
{{- ']~b]' + m.role + '\\n' + m.content -}}
{%- if tools and m.role == 'system' -%}
{{- '\\n\\n# Tools\\n<tools>\\n' -}}
{%- for tool in tools -%}{{- '<tool>' + tool.function | tojson + '</tool>\\n' -}}{%- endfor -%}{{- '</tools>' -}}
{%- endif -%}{{- '[e~[\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ']~b]ai\\n<think>\\n' -}}{%- endif -%}"""


def tiny_tokenizer(vocabulary: int = 768) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a fixed text, with MiniMax-M2's special tokens and template behaviour."""
    import argparse
    import inspect
    import json
    import statistics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        special_tokens=[*SPECIAL.values(), *MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([inspect.getsource(module) for module in (json, statistics, argparse)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, model_max_length=512, **SPECIAL)


def tiny_minimax_m2(
    seed: int = 0, *, layers: int = 2, hidden: int = 64, head: int = 16
) -> tuple[MiniMaxM2ForCausalLM, PreTrainedTokenizerFast]:
    """MiniMax-M2's architecture: whole-vector qk-norm, partial RoPE, sigmoid top-2 routing over 4 fused experts.

    With `hidden` 128 and `head` 64 every matrix consists of whole FP8 blocks of 128 x 128.
    """
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    tokenizer = tiny_tokenizer()
    shape = MiniMaxM2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head,
        # without rotary_dim the class builds full RoPE; M2 rotates half of each head
        rotary_dim=head // 2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return _awake(MiniMaxM2ForCausalLM(shape)), tokenizer


def tiny_llama(seed: int = 0, *, layers: int = 2) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Llama's architecture with the same tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return _awake(LlamaForCausalLM(shape)), tokenizer


def tiny_qwen3_moe(seed: int = 0, *, layers: int = 3) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]:
    """Qwen3-MoE's architecture with the same tokenizer: norms of one head, softmax top-2 of 6, a dense first layer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = tiny_tokenizer()
    shape = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        # not hidden / heads, as in the published models
        head_dim=24,
        num_experts=6,
        num_experts_per_tok=2,
        # the class leaves the chosen experts' weights as they are; published models make them add up to 1
        norm_topk_prob=True,
        mlp_only_layers=[0],
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return _awake(Qwen3MoeForCausalLM(shape)), tokenizer


def _awake(model: torch.nn.Module) -> torch.nn.Module:
    """Larger random weights: at the default 0.02 attention is flat and a wrong mask or position would go unseen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0 if "embed" not in name else 10.0)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(std=0.1)
    return model
