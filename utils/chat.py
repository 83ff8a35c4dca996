"""Prompt and answer as token ids: one convention for training, evaluation and inference.

The prompt is the chat template with the generation prompt; the answer is appended to exactly that, and ends with the
end-of-turn token. Templates that open a think block for generation (MiniMax-M2) get it closed first, empty unless the
data has reasoning, because their generation prompt is not a prefix of the rendered conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_END = "</think>"


def user_text(example: Mapping[str, Any]) -> str:
    """What the user says: the question, after its context when there is one."""
    context = example.get("context")
    return f"{context}\n\nQuestion: {example['question']}" if context else str(example["question"])


def messages(example: Mapping[str, Any], system_prompt: str) -> list[dict[str, str]]:
    """The conversation up to the answer; the system message is always explicit, or templates insert their own."""
    system = {"role": "system", "content": example.get("system") or system_prompt}
    return [system, *(example.get("history") or []), {"role": "user", "content": user_text(example)}]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any], system_prompt: str) -> list[int]:
    """Token ids of everything before the answer."""
    return list(tokenizer(prompt_text(tokenizer, example, system_prompt), add_special_tokens=False)["input_ids"])


def prompt_text(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any], system_prompt: str) -> str:
    """The same as text, as the template renders it."""
    return str(
        tokenizer.apply_chat_template(messages(example, system_prompt), tokenize=False, add_generation_prompt=True)
    )


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str, reasoning: str | None = None) -> list[int]:
    """Token ids that the model should produce after the prompt, the end-of-turn token last."""
    # the closing and the answer are tokenised apart: together their white space could merge over the border
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*_closing_ids(tokenizer, reasoning), *ids, int(tokenizer.eos_token_id)]


def answer_offset(tokenizer: PreTrainedTokenizerBase, reasoning: str | None = None) -> int:
    """How many of `answer_ids` precede the answer itself (the closing of the think block)."""
    return len(_closing_ids(tokenizer, reasoning))


def answer_opening(tokenizer: PreTrainedTokenizerBase, reasoning: str | None = None) -> str:
    """The text between prompt and answer: the closing of the think block where the template opens one."""
    return f"{reasoning or ''}\n{THINK_END}\n\n" if opens_thinking(tokenizer) else ""


def _closing_ids(tokenizer: PreTrainedTokenizerBase, reasoning: str | None) -> list[int]:
    text = answer_opening(tokenizer, reasoning)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def opens_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template's generation prompt leaves a think block open."""
    probe = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rendered = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    return str(rendered).rstrip().endswith("<think>")


def spoken(text: str) -> str:
    """A generated text without its reasoning, as it is scored and shown."""
    return text.rpartition(THINK_END)[2].strip() if THINK_END in text else text.strip()


def document_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of unlabelled documents: no chat tokens, bos before and eos after each."""
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    end = [int(tokenizer.eos_token_id)]
    # one call for all: the tokenizer then works on every core; its advice about length is ours to follow
    return [
        [*begin, *ids, *end] for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    ]
