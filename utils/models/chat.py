"""Prompt and answer as token ids: one convention for training, evaluation and inference.

The prompt is the chat template with the generation prompt; the answer is appended to exactly that, with what the
template writes before it, and ends as the template ends a turn (`turn_format`). Templates that open a think block for
generation (MiniMax-M2) get it closed first, empty unless the data has reasoning, because their generation prompt is
not a prefix of the rendered conversation.

What a person wrote is text: a special token that stands in it (`<|im_end|>`) is spelled out in ordinary tokens. The
template and this module alone put real ones; the marks of a think block in a conversation stay what templates cut at.

The reasoning of earlier turns is handed to the template beside their content (`reasoning_content`), and the template
decides: MiniMax-M2's shows that of turns after the last question alone, so in a prompt it shows none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.models import template_fitting, turn_format
from utils.models.architectures import registry
from utils.models.directory_checks import CONFIG, readable, text_part
from utils.models.turn_format import THINK_END, THINK_MARKS, THINK_START, TemplateError, opens_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"
# stands for a special token that a person wrote while a template is rendered; private use, so in no template
_STAND_IN = 0xF0000
# stands for an answer, to find what a template writes around it; private use too
_MARK = "\ue0f0\ue0f1"
# key of an assistant's turn that is context and not trained
UNTRAINED = "untrained"


def user_text(example: Mapping[str, Any]) -> str:
    """What the user says: the question, after its context when there is one."""
    context = example.get("context")
    return f"{context}\n\nQuestion: {example['question']}" if context else str(example["question"])


def messages(example: Mapping[str, Any], system_prompt: str) -> list[dict[str, Any]]:
    """The conversation up to the answer; the system message is always explicit, or templates insert their own.

    `tool_turns` are what stands between the question and the answer: calls of tools, and their results.
    """
    system = {"role": "system", "content": example.get("system") or system_prompt}
    question = {"role": "user", "content": user_text(example)}
    turns = [*(example.get("history") or []), question, *(example.get("tool_turns") or [])]
    return [system, *({key: value for key, value in turn.items() if key != UNTRAINED} for turn in turns)]


def turn_examples(
    tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any], system_prompt: str
) -> list[dict[str, Any]]:
    """The example once for each assistant turn that is trained, in their order; the example itself is the last.

    Each has what was said before its turn, so its prompt is what the template makes of that, and not a part of the
    whole conversation: MiniMax-M2 and Qwen3 leave the reasoning of earlier turns out. Turns marked `untrained`, and
    those that answer no user, stay context.
    """
    turns = [*(example.get("history") or []), {"role": "user", "content": user_text(example)}]
    turns += example.get("tool_turns") or []
    examples: list[dict[str, Any]] = []
    for at, turn in enumerate(turns):
        user_at = max((i for i in range(at) if turns[i]["role"] == "user"), default=None)
        if (
            turn["role"] != "assistant"
            or turn.get(UNTRAINED)
            or user_at is None
            or turns[at - 1]["role"] == "assistant"
        ):
            continue
        part = {key: example[key] for key in ("document", "system", "tools") if example.get(key)}
        part |= {"id": f"{example.get('id')}:{at}", "history": turns[:user_at], "tool_turns": turns[user_at + 1 : at]}
        # the context stands in the text of the question that it belongs to
        part |= {"question": turns[user_at]["content"], "context": None}
        part |= {"answers": [turn["content"]], "reasoning": turn.get("reasoning_content")}
        if calls := turn.get("tool_calls"):
            written = answer_with_calls(tokenizer, part, calls, system_prompt)
            part |= {"answers": [written], "tool_calls": calls}
        examples.append(part)
    return [*examples, dict(example)]


def answer_with_calls(
    tokenizer: PreTrainedTokenizerBase,
    example: Mapping[str, Any],
    calls: Sequence[Mapping[str, Any]],
    system_prompt: str,
) -> str:
    """The first answer and calls of tools as the template writes them, between its marks of an assistant's turn.

    Raises TemplateError (ValueError) where the template does not write the calls, or a special token stands in them.
    """
    turns = messages(example, system_prompt)
    answer = {"role": "assistant", "content": example["answers"][0]}
    if _special_tokens(tokenizer).search(" ".join(_strings([answer, list(calls)]))):
        raise TemplateError("a special token stands in the text of a call")
    before, plain, whole = (
        _rendered(tokenizer, [*turns, *last], example)
        for last in ([], [{**answer, "content": _MARK}], [{**answer, "tool_calls": list(calls)}])
    )
    head, mark, tail = plain.removeprefix(before).partition(_MARK)
    written = whole.removeprefix(before + head).removesuffix(tail)
    names = [str(call.get("function", {}).get("name")) for call in calls]
    if not mark or before + head + written + tail != whole or not all(name in written for name in names):
        raise TemplateError("the chat template does not write calls of tools")
    return written


def unwritten(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any], system_prompt: str) -> list[str]:
    """What of the conversation up to the answer is not in the prompt that the template makes, each named once.

    A template without a place for tools leaves them out without a word. Raises TemplateError where it refuses.
    """
    prompt = prompt_text(tokenizer, example, system_prompt)
    shown = " ".join(prompt.split())
    missing = [] if _stands_in(shown, [_name(tool) for tool in example.get("tools") or []]) else ["the tools"]
    for turn in messages(example, system_prompt):
        if not _stands_in(shown, [turn.get("content")]):
            missing.append(f"the {'result of a tool' if turn['role'] == 'tool' else turn['role'] + ' turn'}")
        if not _stands_in(shown, [_name(call) for call in turn.get("tool_calls") or []]):
            missing.append("a call of a tool")
    return list(dict.fromkeys(missing))


def _stands_in(shown: str, texts: Sequence[object]) -> bool:
    """Whether each text stands there, as it is or escaped as JSON, but for white space."""
    spellings = [(str(text), json.dumps(text, ensure_ascii=False)[1:-1]) for text in texts if text]
    return all(any(" ".join(spelled.split()) in shown for spelled in pair) for pair in spellings)


def _name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    return str((function if isinstance(function, dict) else tool).get("name"))


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, Any]],
    example: Mapping[str, Any],
    *,
    opens: bool = False,
) -> str:
    """The conversation as the template writes it, in the form that it takes. Raises TemplateError where it refuses."""
    from jinja2.exceptions import TemplateError as Refused

    tools, fitted = example.get("tools") or None, template_fitting.fitted(tokenizer, turns)
    try:
        return str(tokenizer.apply_chat_template(fitted, tools=tools, tokenize=False, add_generation_prompt=opens))
    except (Refused, TypeError, ValueError, AttributeError, KeyError) as error:
        raise TemplateError(f"the chat template refuses the conversation: {error}") from error


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any], system_prompt: str) -> list[int]:
    """Token ids of everything before the answer."""
    turns, tools, written = _with_stand_ins(tokenizer, messages(example, system_prompt), example.get("tools") or [])
    text = _rendered(tokenizer, turns, {"tools": tools}, opens=True)
    if not written:
        return _template_ids(tokenizer, text)
    ids: list[int] = []
    pending = ""
    for piece in _special_tokens(tokenizer).split(text):  # the template's own special tokens, and what is between them
        if written.keys().isdisjoint(piece):
            pending += piece
            continue
        literal = "".join(written.get(character, character) for character in piece)
        ids += [*_template_ids(tokenizer, pending), *text_ids(tokenizer, [literal])[0]]
        pending = ""
    return [*ids, *_template_ids(tokenizer, pending)]


def prompt_text(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any], system_prompt: str) -> str:
    """The prompt as the template renders it; a special token that a person wrote looks like a real one in it."""
    return _rendered(tokenizer, messages(example, system_prompt), example, opens=True)


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, answer: str, reasoning: str | None = None, *, calls: object = None
) -> list[int]:
    """Token ids that the model should produce after the prompt, the end of turn last.

    Raises TemplateError for reasoning that the template has no place for. An answer with `calls` is as the template
    wrote it (`answer_with_calls`), so special tokens in it are real.
    """
    ids = _template_ids(tokenizer, answer) if calls else text_ids(tokenizer, [answer])[0]
    # the closing and the answer are tokenised apart: together their white space could merge over the border
    return [*_closing_ids(tokenizer, reasoning), *ids, *turn_format.end_of_turn(tokenizer)]


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of what a person wrote: no special token comes out, whatever stands in it."""
    # one call for all: the tokenizer then works on every core; its advice about length is ours to follow
    how: dict[str, bool] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    how |= {"return_attention_mask": False, "return_token_type_ids": False}
    return list(tokenizer(list(texts), **how)["input_ids"])


def answer_offset(tokenizer: PreTrainedTokenizerBase, reasoning: str | None = None) -> int:
    """How many of `answer_ids` precede the answer itself (the template's opening, the think block)."""
    return len(_closing_ids(tokenizer, reasoning))


def answer_opening(tokenizer: PreTrainedTokenizerBase, reasoning: str | None = None) -> str:
    """The text between prompt and answer: the template's own, the closing of the think block where it opens one."""
    before, after = turn_format.around_reasoning(tokenizer, reasoning)
    return f"{before}{reasoning or ''}{after}"


def _closing_ids(tokenizer: PreTrainedTokenizerBase, reasoning: str | None) -> list[int]:
    text, (before, after) = reasoning or "", turn_format.around_reasoning(tokenizer, reasoning)
    if _special_tokens(tokenizer).search(text):
        return [*_template_ids(tokenizer, before), *text_ids(tokenizer, [text])[0], *_template_ids(tokenizer, after)]
    return _template_ids(tokenizer, before + text + after) if before + text + after else []


def split_reasoning(text: str, *, opened: bool) -> tuple[str, str]:
    """(reasoning, answer) of a generated text; `opened`: its prompt left a think block open.

    What a block that is never closed holds is reasoning: servers return it as such, beside an empty answer.
    """
    before, mark, after = text.rpartition(THINK_END)
    thoughts, answer = (before, after) if mark else (text, "") if opened else ("", text)
    return thoughts.strip().removeprefix(THINK_START).strip(), answer.strip()


def answer_of(text: str, *, opened: bool = False) -> str:
    """A generated text without its reasoning, as it is scored and shown."""
    return split_reasoning(text, opened=opened)[1]


def shown_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Generated ids without special tokens but for the think marks, which tell reasoning from answer."""
    known = tokenizer.added_tokens_decoder
    return [i for i in ids if i not in known or not known[i].special or str(known[i]) in THINK_MARKS]


def document_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of unlabelled documents: no chat tokens, bos before and eos after each."""
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    end = [int(tokenizer.eos_token_id)]
    return [[*begin, *ids, *end] for ids in text_ids(tokenizer, texts)]


def _with_stand_ins(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, Any]], tools: Sequence[Any]
) -> tuple[list[dict[str, Any]], list[Any], dict[str, str]]:
    """Turns and tools with a character in place of each special token that stands in them, and what each stands for."""
    pattern, texts = _special_tokens(tokenizer), "\n".join(_strings([*turns, *tools]))
    tokens = sorted({token for token in pattern.findall(texts)})
    free = (chr(code) for code in range(_STAND_IN, _STAND_IN + 0xFFFE) if chr(code) not in texts)
    stand_ins = dict(zip(tokens, free, strict=False))

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: stand_ins[match[0]], value)
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        return [replaced(item) for item in value] if isinstance(value, list) else value

    return replaced(list(turns)), replaced(list(tools)), {character: token for token, character in stand_ins.items()}


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _template_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds each special token but the think marks; split at it, a text keeps them."""
    known = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted(known.difference(THINK_MARKS), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, tokens)) or '(?!)'})")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with an end-of-turn token; padding is by position here, so any pad token will do.

    One that only the architecture's module names is set: programs that mask by id would lose the end-of-turn label.
    """
    from transformers import AutoTokenizer

    with readable(directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        settings, stopping = (
            files.read_object(directory / name) if (directory / name).is_file() else {} for name in (CONFIG, GENERATION)
        )
    if not (directory / GENERATION).is_file():  # then transformers stops where config.json says
        stopping = {**settings, **text_part(settings)}
    ends = stopping.get("eos_token_id")
    ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
    setattr(tokenizer, turn_format.ENDS, tuple(token for token in ends if isinstance(token, int)))
    pad = registry.of(settings.get("model_type")).unnamed_pad
    if pad and tokenizer.pad_token_id is None and pad in tokenizer.get_vocab():
        tokenizer.pad_token = pad
    rows = text_part(settings).get("vocab_size") or settings.get("vocab_size")
    if isinstance(rows, int) and tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token  # one that a tool added, and the model has no row for
    problems = []
    if tokenizer.eos_token_id is None:
        problems.append(Problem(f"the tokenizer in {directory} has no eos token", fix="set eos_token in its config"))
    if not tokenizer.chat_template:
        problems.append(Problem(f"the tokenizer in {directory} has no chat template", fix="use an instruct model"))
    if problems:
        raise ArtefactError(problems)
    with readable(directory):
        opens_thinking(tokenizer)  # a template that cannot be rendered is found here and not after hours
    beyond = sorted(token for token in turn_format.needed_tokens(tokenizer) if isinstance(rows, int) and token >= rows)
    if beyond:
        what = f"the model in {directory} has {rows:,} rows of embeddings, and its chat template needs further tokens"
        fix = "give the tokenizer that the model was published with, or resize the model's embeddings to this one"
        raise ArtefactError(Problem(what, tokenizer.convert_ids_to_tokens(beyond), fix))
    return tokenizer


def adopt_ends(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Let generation stop for one tokenizer at what the model of the other says."""
    setattr(tokenizer, turn_format.ENDS, getattr(other, turn_format.ENDS, ()))


def pad_id(tokenizer: Any) -> int:
    """Any token will do: padding is by position."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
