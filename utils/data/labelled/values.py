"""The question, the context and the accepted answers of a row that holds them in columns. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from utils.data.labelled import marks
from utils.data.labelled.column_roles import Row
from utils.data.labelled.row_text import (
    LeftOutError,
    RowError,
    UnanswerableError,
    is_missing,
    is_visible,
    text_of,
    truth,
)

_LISTED_ONCE = ("response", "responses", "output", "outputs", "completion", "completions", "solution", "solutions")
# an object of a list of answers that has one of these is one of several posts or samples
_RANKS = ("score", "pm_score", "rank", "rating", "votes", "upvotes", "selected", "is_accepted")
_IMPOSSIBLE = {"is_impossible": True, "unanswerable": True, "answerable": False, "is_answerable": False}


def question_of(row: Row) -> tuple[str, Any]:
    """(shape, question); an instruction beside a question stands before it, an input beside one is its context."""
    if "question" in row.column_map.columns:
        value = row.value("question")
        return "question", "\n\n".join(text_of(v, "question") for v in value) if isinstance(value, list) else value
    names = row.filled("question")
    shape = {"instruction": "alpaca", "prompt": "prompt"}.get(names[0] if names else "", "question")
    if names and names[0] in ("instruction", "instructions"):
        return shape, row.take(names[0], "question")
    value = row.value("question")
    directive = next((name for name in ("instruction", "instructions") if names and row.has(name)), None)
    if directive and isinstance(value, str):
        value = f"{text_of(row.take(directive, 'question'), 'instruction')}\n\n{text_of(value, 'question')}"
    return shape, value


def accepted(row: Row, answers: Any, column: str) -> Any:
    """The accepted answers as one value or a list, out of SQuAD's, TriviaQA's and DROP's objects too."""
    row.take("plausible_answers", "mark")  # SQuAD v2: what is not the answer
    if any(truth(row.take(name, "mark")) is impossible for name, impossible in _IMPOSSIBLE.items()):
        raise UnanswerableError
    if isinstance(answers, dict):
        listed = next((answers[key] for key in ("text", "spans") if isinstance(answers.get(key), list)), None)
        if listed is None and isinstance(answers.get("value"), str):
            listed = [answers["value"], *(a for a in _listed(answers.get("aliases")) if isinstance(a, str))]
        if listed is None:
            raise RowError("`answers` is an object without a list `text`", answers, 'write {"text": ["..."]} or a list')
        if not listed:
            raise UnanswerableError
        return listed
    objects = [item for item in answers if isinstance(item, dict)] if isinstance(answers, list) else []
    if objects and all("value" in item and "status" in item for item in objects):  # Argilla: who answered, and whether
        answers = [item["value"] for item in objects if item["status"] == "submitted"]
        if not answers:
            raise LeftOutError(marks.UNTRAINED)
        objects = []
    if len(objects) > 1 and (ranks := [name for name in _RANKS if any(name in item for item in objects)]):
        what = f"`{column}` are ranked by {', '.join(ranks)}: not all of them are right"
        raise RowError(what, answers, "keep those that are right, as texts", of_file=True)
    return single(answers, column)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def single(value: Any, column: str) -> Any:
    """Of several outputs none is known to be right; several `answers` are all accepted."""
    if column in _LISTED_ONCE and isinstance(value, list):
        if len(value) == 1:
            return value[0]
        fix = "ranked or sampled outputs are no accepted answers: keep the right one, or call the column `answers`"
        raise RowError(f"`{column}` is a list of {len(value)} outputs", value, fix)
    return value


def question_text(value: object) -> str:
    text = "" if is_missing(value) else marks.check_media(text_of(value, "question"))
    if not is_visible(text):
        raise RowError("no question", fix="write the question, or delete the row")
    return text


def context_of(row: Row) -> str | None:
    """The context: one text, or several passages with a blank line between them."""
    names = row.filled("context")
    extra = next((name for name in ("input", "inputs") if row.has(name) and name not in row.used), None)
    if extra and names and not is_missing(row.values[names[0]]):
        what = f"2 columns could be the context: {names[0]}, {extra}"
        raise RowError(what, row.values[extra], f"say which: --data.columns context={extra}", of_file=True)
    value = row.take(extra, "context") if extra and not names else row.value("context")
    texts = list(_passages(value))
    return marks.check_media("\n\n".join(text for text in texts if text)) or None


def _passages(value: Any) -> Iterator[str]:
    if is_missing(value):
        return
    if isinstance(value, dict):  # PubMedQA {"contexts": [...]}, HotpotQA {"title": [...], "sentences": [[...]]}
        if isinstance(value.get("sentences"), list):
            titles = value.get("title") if isinstance(value.get("title"), list) else []
            for number, sentences in enumerate(value["sentences"]):
                head = f"{titles[number]}\n" if number < len(titles) else ""
                yield text_of(head + "".join(map(str, _listed(sentences))), "context")
            return
        inner = next((value[k] for k in ("contexts", "passage_text", "text", "content", "passage") if k in value), None)
        if inner is None:
            raise RowError("the context is an object without a text", value, "write a string, or a list of strings")
        head = f"{value['title']}\n" if isinstance(value.get("title"), str) and isinstance(inner, str) else ""
        yield from ([text_of(head + inner, "context")] if head else _passages(inner))
    elif isinstance(value, list):
        for item in value:
            yield from _passages(item)
    else:
        yield text_of(value, "context")
