"""Which part of a context is kept where prompt and context together are too long for a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.models import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fitting_prompt(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    room: int,
    *,
    for_training: bool = False,
) -> tuple[list[int] | None, bool]:
    """The prompt in at most `room` tokens and whether its context was shortened; None when it cannot fit.

    A context keeps its beginning; `for_training` the part around an answer that stands in it (scored without a hint).
    """
    prompt = chat.prompt_ids(tokenizer, example, system_prompt)
    if len(prompt) <= room:
        return prompt, False
    context = example.get("context")
    if not context:
        return None, False
    context_ids = chat.text_ids(tokenizer, [context])[0]
    at = context.find(example["answers"][0]) if for_training else -1
    before, span = map(len, chat.text_ids(tokenizer, [context[: max(0, at)], example["answers"][0]]))
    keep = len(context_ids) - (len(prompt) - room)
    while keep > 0:
        # the answer in the middle, unless that would leave room at either end
        start = max(0, min(before - (keep - span) // 2, len(context_ids) - keep)) if at > 0 else 0
        shorter = {**example, "context": tokenizer.decode(context_ids[start : start + keep])}
        prompt = chat.prompt_ids(tokenizer, shorter, system_prompt)
        if (over := len(prompt) - room) <= 0:
            return prompt, True
        keep -= over  # re-tokenising the shortened text can merge differently
    return None, False
