"""What a chat template writes around an answer: before it, after it, and where reasoning goes. Read off a rendering.

Generation stops at the end of a turn, so an answer is trained and scored up to and including the token at which it
stops; what the template writes after that (a line break) is context of the next turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from utils.models import template_fitting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# stand for an answer and its reasoning while a template is rendered; private use, so in no template
_ANSWER, _REASONING = "\ue0f2\ue0f3", "\ue0f4\ue0f5"
_USER = {"role": "user", "content": "u"}
# what templates call the reasoning of a message
_KEYS = ("reasoning_content", "reasoning", "thinking")
THINK_START, THINK_END = THINK_MARKS = ("<think>", "</think>")
_EMPTY_BLOCK = re.compile(rf"({THINK_START}\n?)\s*?(\n?{THINK_END})")
# where `chat.load_tokenizer` leaves the ids at which generation_config.json says that generation stops
ENDS = "generation_ends"


class TemplateError(ValueError):
    """What the chat template of a model cannot write; the message is the reason."""


@dataclass(frozen=True)
class TurnFormat:
    """`opening` stands between the generation prompt and an answer, `end` (token ids) ends its turn.

    `reasoning` is what stands before and after the reasoning, in place of `opening`; None where there is no place.
    """

    opening: str
    end: tuple[int, ...]
    reasoning: tuple[str, str] | None = None


_known: WeakKeyDictionary[Any, tuple[Any, TurnFormat]] = WeakKeyDictionary()


def of(tokenizer: PreTrainedTokenizerBase) -> TurnFormat:
    """The format of the template; a turn ends with the eos token where that cannot be read off it."""
    key = (str(tokenizer.chat_template), tokenizer.eos_token_id, getattr(tokenizer, ENDS, ()))
    if _known.get(tokenizer, (None,))[0] != key:
        _known[tokenizer] = (key, _read(tokenizer))
    return _known[tokenizer][1]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a turn, up to and including the one at which generation stops."""
    return list(of(tokenizer).end)


def around_reasoning(tokenizer: PreTrainedTokenizerBase, reasoning: str | None) -> tuple[str, str]:
    """What stands before and after the reasoning, between prompt and answer; without any, in place of it.

    Raises TemplateError for reasoning that the template has no place for.
    """
    if opens_thinking(tokenizer):
        return "", f"\n{THINK_END}\n\n"
    form = of(tokenizer)
    if not reasoning:
        return form.opening, ""
    if form.reasoning is None:
        raise TemplateError("the chat template has no place for reasoning")
    return form.reasoning


def has_place_for_reasoning(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether reasoning that is in the data can stand before an answer."""
    return opens_thinking(tokenizer) or of(tokenizer).reasoning is not None


def writes_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what the model says begins in a think block or with one, as the template writes it."""
    return opens_thinking(tokenizer) or THINK_END in of(tokenizer).opening


def opens_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template's generation prompt leaves a think block open."""
    probe = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    fitted = template_fitting.fitted(tokenizer, probe, says=False)
    rendered = tokenizer.apply_chat_template(fitted, tokenize=False, add_generation_prompt=True)
    return str(rendered).rstrip().endswith(THINK_START)


def deciding(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What stands around answers, where that is not nothing before and eos after, for an identity; else empty."""
    form = of(tokenizer)
    turn: dict[str, Any] = {}
    if form.opening and not opens_thinking(tokenizer):
        turn["opening"] = form.opening
    if form.end != (tokenizer.eos_token_id,):
        turn["end"] = list(form.end)
    return {"turn": turn} if turn else {}


def needed_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of eos and of what the template writes around turns."""
    turns = [_USER, {"role": "assistant", "content": _USER["content"]}]
    text = _rendered(tokenizer, turns) + _rendered(tokenizer, [_USER], opens=True)
    return {int(tokenizer.eos_token_id), *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]}


def _read(tokenizer: PreTrainedTokenizerBase) -> TurnFormat:
    prompt = _rendered(tokenizer, [_USER], opens=True)
    head, tail = _around(_rendered(tokenizer, [_USER, {"role": "assistant", "content": _ANSWER}]))
    _, followed = _around(_rendered(tokenizer, [_USER, {"role": "assistant", "content": _ANSWER}, _USER]))
    opening = head.removeprefix(prompt) if prompt and head.startswith(prompt) else ""
    opening = opening if opening.strip() else ""  # a blank joins the answer's first token
    end = _end(tokenizer, tail, _ending_tokens(tokenizer)) or _end(tokenizer, followed, getattr(tokenizer, ENDS, ()))
    return TurnFormat(opening, tuple(end or [int(tokenizer.eos_token_id)]), _reasoning(tokenizer, prompt, opening))


def _reasoning(tokenizer: PreTrainedTokenizerBase, prompt: str, opening: str) -> tuple[str, str] | None:
    """Found by putting some in, by every name that templates have for it; else an empty think block is the place."""
    turns: list[dict[str, str]] = [{"content": _ANSWER, key: _REASONING} for key in _KEYS]
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if set(THINK_MARKS) <= known and THINK_END in str(tokenizer.chat_template):
        turns.append({"content": f"{THINK_START}\n{_REASONING}\n{THINK_END}\n\n{_ANSWER}"})
    for turn in turns:
        head, _ = _around(_rendered(tokenizer, [_USER, {"role": "assistant", **turn}]))
        before, mark, after = head.removeprefix(prompt).partition(_REASONING)
        if mark and prompt and head.startswith(prompt):
            return before, after
    block = _EMPTY_BLOCK.search(opening)
    return (opening[: block.end(1)], opening[block.start(2) :]) if block else None


def _end(tokenizer: PreTrainedTokenizerBase, tail: str, ending: Iterable[int]) -> list[int]:
    """The beginning of what follows an answer up to the first of these tokens; empty where none is in it."""
    ids = list(tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]) if tail else []
    at = next((at for at, token in enumerate(ids) if token in set(ending)), None)
    return [] if at is None else ids[: at + 1]


def _ending_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a turn when they stand right after an answer: all that are no text."""
    texts = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    marks = {number for number, text in texts.items() if text.strip() and text not in THINK_MARKS}
    return marks | {int(tokenizer.eos_token_id), *getattr(tokenizer, ENDS, ())}


def _around(text: str) -> tuple[str, str]:
    """What stands before and after the answer; nothing where it is not there."""
    head, mark, tail = text.partition(_ANSWER)
    return (head, tail) if mark else ("", "")


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, opens: bool = False) -> str:
    """The conversation as the template writes it; empty where it refuses."""
    from jinja2.exceptions import TemplateError as Refused

    fitted = template_fitting.fitted(tokenizer, turns, says=False)
    try:
        return str(tokenizer.apply_chat_template(fitted, tokenize=False, add_generation_prompt=opens))
    except (Refused, TypeError, ValueError, AttributeError, KeyError):
        return ""
