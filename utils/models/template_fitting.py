"""What a chat template takes, asked of the template itself, and conversations brought into that form.

Some templates have no system role (Gemma 1 and 2, Mistral's first ones), some refuse two turns of one role in a row,
and some read a message's content as a list of parts alone, and show nothing of a text.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.logger import event

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what stands between two texts that become one
BETWEEN = "\n\n"
# words that stand in no template
_FIRST, _SECOND = "zqfirstqz", "zqsecondqz"


@dataclass(frozen=True)
class TemplateForm:
    """Whether it shows a system message, takes two turns of one role in a row, and reads lists of parts alone."""

    system: bool
    neighbours: bool
    parts: bool


def form_of(tokenizer: PreTrainedTokenizerBase) -> TemplateForm:
    """What the tokenizer's chat template takes."""
    key = repr((tokenizer.chat_template, tokenizer.special_tokens_map))
    if key not in _FORMS:
        _FORMS[key] = _found_form(tokenizer)
    return _FORMS[key]


def fitted(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, Any]], *, says: bool = True
) -> list[dict[str, Any]]:
    """The conversation as the template takes it.

    Without a system role the system text goes in front of the first user turn, or nowhere when it is empty; where
    neighbours of one role are refused they are joined, unless one of them is about tools.
    """
    form, conversation = form_of(tokenizer), [dict(turn) for turn in turns]
    if not form.system and conversation and conversation[0]["role"] == "system":
        system = conversation.pop(0)["content"]
        first = next((turn for turn in conversation if turn["role"] == "user"), None)
        if system and first is not None:
            if says:
                _say_moved(repr(tokenizer.chat_template))
            first["content"] = f"{system}{BETWEEN}{first['content']}"
    if not form.neighbours:
        conversation = _joined(conversation)
    if form.parts:
        for turn in conversation:
            if isinstance(turn.get("content"), str):
                turn["content"] = [{"type": "text", "text": turn["content"]}]
    return conversation


_FORMS: dict[str, TemplateForm] = {}


def _found_form(tokenizer: PreTrainedTokenizerBase) -> TemplateForm:
    def shows(roles: Sequence[str], *, parts: bool) -> bool:
        contents = [[{"type": "text", "text": text}] if parts else text for text in (_FIRST, _SECOND)]
        turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception:  # noqa: BLE001  whatever the template's author chose
            return False
        return all(word in text for word in (_FIRST, _SECOND)[: len(roles)])

    parts = not shows(["user"], parts=False) and shows(["user"], parts=True)
    return TemplateForm(shows(["system", "user"], parts=parts), shows(["user", "user"], parts=parts), parts)


def _joined(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    conversation: list[dict[str, Any]] = []
    for turn in turns:
        last = conversation[-1] if conversation else {}
        plain = {"role", "content"}
        if last.get("role") == turn["role"] != "tool" and not (set(last) | set(turn)) - plain:
            last["content"] = f"{last['content']}{BETWEEN}{turn['content']}"
        else:
            conversation.append(turn)
    return conversation


@functools.cache
def _say_moved(_: str) -> None:
    event("the chat template has no system role: the system prompt goes in front of the first user turn")
