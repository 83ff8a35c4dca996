"""The shapes in which people keep labelled examples, each turned into the one the pipeline knows.

Pure: one row (a dict of columns, names in lower case) in, the common fields out. A new shape is one function and one
row in SHAPES. Raises RowError for a row that is wrong, UnanswerableError for one that has nothing to learn.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Columns = dict[str, Any]
Turn = dict[str, str]

_THINKING = re.compile(r"\s*<think>(?P<reasoning>.*?)</think>(?P<answer>.*)", re.DOTALL)
# what the log of a server has: the template put <think> into the prompt, and the model closes it on a line of its own
_OPENED_THINKING = re.compile(r"(?P<reasoning>(?:(?!<think>).)*?\n)?</think>\n(?P<answer>.*\S.*)", re.DOTALL)
_THINK_MARK = re.compile(r"</?think>")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
_ROLES |= {role: role for role in ("system", "user", "assistant")}


class RowError(ValueError):
    """One thing that is wrong with a row: what, the value to blame, and what to do about it."""

    def __init__(self, what: str, value: object = None, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.value, self.fix = what, value, fix


class UnanswerableError(Exception):
    """A SQuAD row with an empty list of answers: the question has none, so there is nothing to train or score on."""


@dataclass(frozen=True)
class Shape:
    """One accepted shape: the row has it if of each group in `needs` at least one column is there."""

    needs: tuple[tuple[str, ...], ...]
    accepted: str
    read: Callable[[Columns], Columns]


def to_common(row: Columns) -> tuple[str, Columns]:
    """The name of the row's shape and its common fields without `id` and `document`.

    Raises RowError (unknown shape, no question, no or empty answers, bad choices or index) or UnanswerableError.
    """
    name = _shape_of(row)
    if name is None:
        raise RowError("unknown shape", f"columns {', '.join(row) or '(none)'}", f"accepted: {accepted_shapes()}")
    fields = SHAPES[name].read(row)
    if name == "question" and fields["choices"] is not None:
        name = "question with choices"
    elif name == "question" and isinstance(row.get("answers"), dict):
        name = "squad"
    return name, fields


def accepted_shapes() -> str:
    """One line for error messages."""
    return "; ".join(shape.accepted for shape in SHAPES.values())


def _shape_of(row: Columns) -> str | None:
    # values before names: a parquet file of several shapes has every column in every row, most of them null
    for has in (lambda column: row.get(column) not in (None, ""), lambda column: column in row):
        for name, shape in SHAPES.items():
            if all(any(has(column) for column in group) for group in shape.needs):
                return name
    # half a question is a question with something missing, and that is the more useful message
    return next((n for n, s in SHAPES.items() if any(group[0] in row or group[-1] in row for group in s.needs)), None)


def _from_question(row: Columns) -> Columns:
    answers = row.get("answers") if row.get("answers") not in (None, "") else row.get("answer")
    choices, index = _choices(row)
    if isinstance(answers, dict):
        if not isinstance(answers.get("text"), list):
            raise RowError("`answers` is an object without a list `text`", answers, 'write {"text": ["..."]} or a list')
        if not answers["text"]:
            raise UnanswerableError
        answers = answers["text"]
    if choices is not None and index is None and _is_number(answers) and str(answers) not in choices:
        answers, index = None, _in_range(answers, choices)
    if answers is None and index is not None and choices is not None:
        answers = choices[index]
    return _common(row, _question(row.get("question")), answers, choices=choices, index=index)


def _from_prompt(row: Columns) -> Columns:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": _question(prompt)}]
        if not isinstance(completion, list):
            completion = [{"role": "assistant", "content": completion}]
        return _from_turns(row, [*turns, *completion])
    return _common(row, _question(prompt), completion)


def _from_alpaca(row: Columns) -> Columns:
    context = row.get("input") if row.get("input") not in (None, "") else row.get("context")
    return _common({**row, "context": context}, _question(row.get("instruction")), row.get("output"))


def _from_turns(row: Columns, turns: object) -> Columns:
    read = _turns(turns)
    last = max((i for i, turn in enumerate(read) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise RowError("no answer: there is no assistant turn", turns, "end the messages with the answer")
    system = "\n\n".join(turn["content"] for turn in read if turn["role"] == "system")
    before = [_past(turn) for turn in read[:last] if turn["role"] != "system"]
    if not before or before[-1]["role"] != "user":
        found = before[-1]["role"] if before else "nothing"
        raise RowError("no question: the turn before the last answer is not the user's", found, "put a user turn there")
    # vLLM, MiniMax and DeepSeek return the thoughts beside the content instead of inside <think>
    reasoning = read[last].get("reasoning") or row.get("reasoning")
    row = {**row, "system": system or row.get("system"), "history": before[:-1], "reasoning": reasoning}
    return _common(row, _question(before[-1]["content"]), read[last]["content"])


def _turns(turns: object) -> list[Turn]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(
            "the messages are not a list of objects", turns, 'write [{"role": "user", "content": "..."}, ...]'
        )
    read = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if _ROLES.get(str(role)) is None:
            raise RowError("a turn of unknown role", role, f"one of {', '.join(_ROLES)}")
        if isinstance(content, list):  # the multimodal form: [{"type": "text", "text": "..."}]
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
        if not isinstance(content, str):
            raise RowError(f"the content of a {role} turn is not text", content, "write a string")
        thoughts = turn.get("reasoning_content") or turn.get("reasoning")
        if thoughts is not None and not isinstance(thoughts, str):
            raise RowError(f"the reasoning of a {role} turn is not text", thoughts, "write a string")
        read.append({"role": _ROLES[str(role)], "content": content.strip(), "reasoning": thoughts or ""})
    return read


def _past(turn: Turn) -> Turn:
    """A turn before the question; what an assistant thought stands apart, as templates expect it."""
    content, reasoning = turn["content"], turn["reasoning"]
    if turn["role"] == "assistant":
        thought, content = _split_thinking(content)
        reasoning = _only_thoughts(reasoning) or thought
    said = {"role": turn["role"], "content": content}
    return said | {"reasoning_content": reasoning} if reasoning and turn["role"] == "assistant" else said


def _common(
    row: Columns, question: str, answers: object, *, choices: list[str] | None = None, index: int | None = None
) -> Columns:
    if answers is None or answers == []:
        raise RowError("no answers", fix="give `answers`, a list of accepted answers, or `answer`; or delete the row")
    texts, thoughts = [], None
    for item in answers if isinstance(answers, list) else [answers]:
        thought, text = _split_thinking(_text(item, "answer"))
        if not text:
            raise RowError("empty answer", item, "write the answer, or delete the row")
        thoughts = thoughts or thought
        texts.append(text)
    if choices is not None:
        same = [i for i, choice in enumerate(choices) if _normal(choice) in {_normal(text) for text in texts}]
        if index is None and not same:
            raise RowError("none of the answers is among the choices", texts[0], f"the choices are {choices}")
        if index is not None and index not in same:
            what = f"answer_index {index} is the choice {choices[index]!r}, which is not among the answers"
            raise RowError(what, texts[0], "answer_index counts from 0")
        index = same[0] if index is None else index
    return {
        "system": _optional(row, "system"),
        "history": _history(row.get("history")),
        "question": question,
        "context": _optional(row, "context"),
        "reasoning": _only_thoughts(_optional(row, "reasoning") or _optional(row, "reasoning_content")) or thoughts,
        "answers": list(dict.fromkeys(texts)),
        "choices": choices,
        "answer_index": index,
    }


def _choices(row: Columns) -> tuple[list[str] | None, int | None]:
    choices, labels = row.get("choices"), None
    if isinstance(choices, dict):  # ARC: {"text": [...], "label": ["A", ...]} with answerKey
        choices, labels = choices.get("text"), choices.get("label")
    index, key = row.get("answer_index"), row.get("answerkey")
    if choices in (None, "", []):
        if index not in (None, ""):
            raise RowError("answer_index without choices", index, "give `choices`, or leave answer_index out")
        return None, None
    if not isinstance(choices, list) or len(choices) < 2:
        raise RowError("fewer than 2 choices", choices, "give a list of 2 or more, or leave `choices` out")
    texts = [_text(choice, "choice") for choice in choices]
    if not all(texts):
        raise RowError("an empty choice", choices, "write the choice, or take it out and correct answer_index")
    if index not in (None, ""):
        return texts, _in_range(index, texts)
    if key in (None, ""):
        return texts, None
    letters = [chr(ord("A") + i) for i in range(len(texts))]
    names = [str(label) for label in labels] if isinstance(labels, list) and labels else letters
    if str(key).strip() not in names or len(names) != len(texts):
        raise RowError("answerKey is not one of the choice labels", key, f"the labels are {names}")
    return texts, names.index(str(key).strip())


def _in_range(index: object, choices: list[str]) -> int:
    try:
        number = int(str(index).strip().removesuffix(".0"))
    except ValueError:
        number = -1
    if not 0 <= number < len(choices):
        raise RowError("answer_index out of range", index, f"0 to {len(choices) - 1}: it counts from 0")
    return number


def _history(value: object) -> list[Turn]:
    if value in (None, "", []):
        return []
    if isinstance(value, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        roles = ("user", "assistant")  # Alpaca's [["question", "answer"], ...]
        value = [{"role": role, "content": text} for pair in value for role, text in zip(roles, pair, strict=True)]
    return [_past(turn) for turn in _turns(value)]


def _question(value: object) -> str:
    text = "" if value is None else _text(value, "question")
    if not text:
        raise RowError("no question", fix="write the question, or delete the row")
    return text


def _optional(row: Columns, column: str) -> str | None:
    return None if row.get(column) is None else _text(row[column], column) or None


def _text(value: object, column: str) -> str:
    if isinstance(value, dict) and isinstance(value.get("text"), str):  # original SQuAD: [{"text": ..., ...}]
        value = value["text"]
    if not isinstance(value, str) and not _is_number(value):
        what = "empty answer" if value is None and column == "answer" else f"`{column}` is a {type(value).__name__}"
        raise RowError(what, value, "write a string")
    return str(value).strip()


def _only_thoughts(text: str | None) -> str | None:
    """Reasoning without the marks around it. Raises RowError for one inside it, which would end the think block."""
    inside = (text or "").strip().removeprefix("<think>").removesuffix("</think>").strip()
    if _THINK_MARK.search(inside):
        raise RowError("a think mark inside the reasoning", inside, "write the reasoning without <think> and </think>")
    return inside or None


def _split_thinking(answer: str) -> tuple[str | None, str]:
    if match := _THINKING.fullmatch(answer) or _OPENED_THINKING.fullmatch(answer):
        if _THINK_MARK.search(match["answer"]):
            raise RowError("a second think mark in one answer", answer, "one <think>...</think>, then the answer")
        return _only_thoughts(match["reasoning"]), match["answer"].strip()
    if answer.startswith("<think>"):
        raise RowError("<think> is never closed", answer, "close it with </think> before the answer")
    return None, answer


def _is_number(value: object) -> bool:
    # NaN is how some tools write a missing cell
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _normal(text: str) -> str:
    return text.strip().casefold()


SHAPES: dict[str, Shape] = {
    "messages": Shape(
        (("messages",),), "messages [{role, content}]", lambda row: _from_turns(row, row.get("messages"))
    ),
    "sharegpt": Shape(
        (("conversations",),), "conversations [{from, value}]", lambda row: _from_turns(row, row.get("conversations"))
    ),
    "question": Shape(
        (("question",), ("answers", "answer_index", "answerkey", "answer")),
        "question + answers or answer (+ context, choices, answer_index; SQuAD and ARC too)",
        _from_question,
    ),
    "alpaca": Shape((("instruction",), ("output",)), "instruction + input + output", _from_alpaca),
    "prompt": Shape((("prompt",), ("completion",)), "prompt + completion (text or messages)", _from_prompt),
}
