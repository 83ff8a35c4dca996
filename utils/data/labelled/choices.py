"""Multiple choice: where people keep the choices, and how they say which one is right. Pure."""

from __future__ import annotations

import re
from typing import Any

from utils.data.labelled.column_roles import Row, column_name
from utils.data.labelled.row_text import RowError, is_missing, is_number, normal, text_of, truth

LISTS = ("choices", "options", "answer_options", "answer_choices", "alternatives", "endings", "candidates")
KEYS = ("answer_index", "answer_idx", "answerkey", "answer_key", "correct_index", "correct_option", "correct_idx")
KEYS += ("answer_letter", "answer_label", "label", "gold", "gold_index", "cop", "correct")
WRONG = re.compile(r"(?:incorrect_answer|wrong_answer|distractor)s?_?\d*")
# what choices are counted by: letters of several scripts, each in its order
ORDERS = (
    "abcdefghijklmnopqrstuvwxyz",
    "абвгдежз",
    "αβγδεζηθ",
    "アイウエオカキク",
    "①②③④⑤⑥⑦⑧",
    "甲乙丙丁戊",
    "가나다라마바",
)
_PLACES = {letter: (order, at) for order in ORDERS for at, letter in enumerate(order)}
_SIGN = f"[{''.join(ORDERS)}]"
_SERIES = re.compile(rf"(?P<stem>option|opt|choice|op|sol|ending|answer|ans|)_?(?P<place>{_SIGN}|[0-9]{{1,2}})")
_LETTER = re.compile(rf"[(（]?({_SIGN})[)）]?[.):．、]?", re.IGNORECASE)
_LETTER_AND_TEXT = re.compile(rf"[(（]?({_SIGN})[).:．、）]\s*(\S.*)", re.DOTALL | re.IGNORECASE)
# what an object of a list of answers says of itself
_FLAGS = ("correct", "is_correct", "iscorrect", "right", "is_right", "is_answer", "isanswer", "fraction")
_TEXTS = ("text", "value", "content", "option", "answer")
# which choice is right, as a number that may count from 0 or from 1: (number, choices); the file decides
Unsure = tuple[int, int]


def are_there(row: Row) -> bool:
    """Whether the row has choices, by its columns' names or by what the person said."""
    return "choices" in row.column_map.columns or any(row.has(name) for name in LISTS) or bool(_series(row))


def read_choices(row: Row) -> tuple[list[str] | None, list[str], str]:
    """(texts, labels, columns) of the row's choices; (None, [], "") for a row without any."""
    if "choices" in row.column_map.columns:
        names = row.filled("choices")
        value = row.value("choices")
        texts, labels = _listed(value) if isinstance(value, (list, dict)) else (value, [])
        return _checked(texts, labels, value), labels, ", ".join(names)
    for name in LISTS:
        if row.has(name):
            value = row.take(name, "choices")
            texts, labels = _listed(value)
            return _checked(texts, labels, value), labels, name
    if names := _series(row):
        texts = [row.take(name, "choices") for name in names]
        return _checked(texts, [], texts), [], ", ".join(names)
    return None, [], ""


def flagged(row: Row) -> tuple[list[str], str] | None:
    """(texts, the right one) of a list whose objects say which of them is right (H5P, Moodle); None for any other.

    Raises RowError where none is right or several are: there is one right choice.
    """
    for name in (*LISTS, "answers"):
        value = row.peek(name)
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, dict) for item in value):
            continue
        items = [{column_name(key): one for key, one in item.items()} for item in value]
        flag = next((key for key in _FLAGS if all(key in item for item in items)), None)
        if flag is None:
            continue
        texts, _ = _listed(row.take(name, "choices"))
        right = [
            at
            for at, item in enumerate(items)
            if truth(item[flag]) or (flag == "fraction" and item[flag] in (100, "100"))
        ]
        if len(right) != 1:
            what = f"{len(right)} of the {len(items)} objects in `{name}` are marked as right by `{flag}`"
            raise RowError(what, value, "mark one of them, or leave the row out")
        checked = _checked(texts, [], value)
        return checked, checked[right[0]]
    return None


def right_choice(
    row: Row, texts: list[str], labels: list[str], answer: Any, columns: str
) -> tuple[int | None, Unsure | None, bool]:
    """(index of the right choice, the number of one that may count from 0 or 1, whether the answer is such a key).

    Raises RowError for a key that names no choice, or two keys that name different ones.
    """
    indices: dict[str, int] = {}
    unsure, from_column = None, False
    numbered = columns in LISTS or "choices" in row.column_map.columns
    named = columns.split(", ")
    for name, base in (("answer_index", 0), ("answer_number", 1)):
        if name in row.column_map.columns and not is_missing(value := row.value(name)):
            indices[name] = _in_range(value, texts, base)
    for name in KEYS:
        if not row.has(name):
            continue
        value = row.take(name, "answer_index")
        if name == "answer_index":
            indices[name] = _in_range(value, texts, 0)
            continue
        index, number = _of_key(value, texts, labels, named, from_zero=numbered or name == "answer_idx")
        if index is None and number is None:
            shown = "answerKey" if name == "answerkey" else name
            known = labels or [chr(ord("A") + i) for i in range(len(texts))]
            raise RowError(f"{shown} is not one of the choice labels", value, f"the labels are {known}")
        unsure, from_column = number or unsure, from_column or number is not None
        if index is not None:
            indices[name] = index
    single = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    if isinstance(single, (str, int, float)) and not isinstance(single, bool) and not same(texts, [single]):
        index, number = _of_key(single, texts, labels, named, from_zero=numbered)
        if index is None and number is None and is_number(single):
            _in_range(single, texts, 0)
        unsure = number if number and not indices else unsure
        indices |= {} if index is None else {"answer": index}
    if len(set(indices.values())) > 1:
        raise RowError("two columns name different choices", indices, "correct one of them")
    is_key = is_missing(answer) or "answer" in indices or (not indices and unsure is not None and not from_column)
    return (next(iter(indices.values())), None, is_key) if indices else (None, unsure, is_key)


def wrong_answers(row: Row) -> list[str]:
    """Texts of distractors kept beside the right answer (SciQ, GPQA), each column or list of them."""
    names = [name for name in row.values if WRONG.fullmatch(name) and row.has(name)]
    values = [row.take(name, "choices") for name in names]
    return [text_of(item, "choice") for value in values for item in (value if isinstance(value, list) else [value])]


def match(texts: list[str], answers: list[str], index: int | None) -> int:
    """The index of the choice that the answers are. Raises RowError when they are none, or another than `index`."""
    equal = same(texts, answers)
    if index is None and not equal:
        raise RowError("none of the answers is among the choices", answers[0], f"the choices are {texts}")
    if index is not None and index not in equal:
        what = f"answer_index {index} is the choice {texts[index]!r}, which is not among the answers"
        raise RowError(
            what,
            answers[0],
            "answer_index counts from 0; if yours counts from 1: --data.columns " "answer_number=COLUMN",
        )
    return equal[0] if index is None else index


def same(texts: list[str], answers: list[Any]) -> list[int]:
    normal_answers = {normal(str(answer)) for answer in answers}
    return [i for i, text in enumerate(texts) if normal(text) in normal_answers]


def _listed(value: Any) -> tuple[list[Any] | Any, list[str]]:
    """(texts, labels) of a list, of ARC's {"text", "label"}, of {"A": ..., "B": ...}, of [{"key", "value"}]."""
    if isinstance(value, dict):
        if isinstance(value.get("text"), list):
            labels = value.get("label")
            return value["text"], [str(label) for label in labels] if isinstance(labels, list) else []
        filled = {str(key): item for key, item in value.items() if not is_missing(item)}  # parquet has every key
        return list(filled.values()), list(filled)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        keys = [next((item[k] for k in ("key", "label", "letter", "id") if k in item), None) for item in value]
        texts = [next((item[k] for k in _TEXTS if k in item), None) for item in value]
        return texts, [str(key) for key in keys] if None not in keys else []
    return value, []


def _series(row: Row) -> list[str]:
    """Columns A to D, option_1 to option_4, opa to opd and the like: at least two, from the first place on."""
    stems: dict[tuple[str, str], dict[int, str]] = {}
    for name in row.values:
        if (series := _SERIES.fullmatch(name)) and row.has(name):
            order, at = _PLACES.get(series["place"]) or ("", int(series["place"]))
            if series["stem"] or order:
                stems.setdefault((series["stem"], order), {})[at] = name
    for (_, order), places in sorted(stems.items(), key=lambda item: -len(item[1])):
        ordered = sorted(places)
        is_whole = len(ordered) >= 2 and ordered == list(range(ordered[0], ordered[0] + len(ordered)))
        if is_whole and ordered[0] <= (0 if order else 1):
            return [places[place] for place in ordered]
    return []


def _checked(texts: Any, labels: list[str], value: Any) -> list[str]:
    if not isinstance(texts, list) or len(texts) < 2:
        raise RowError("fewer than 2 choices", value, "give a list of 2 or more, or leave `choices` out")
    read = [text_of(text, "choice") for text in texts]
    if not all(read):
        raise RowError("an empty choice", value, "write the choice, or take it out and correct answer_index")
    if labels and len(labels) != len(read):
        raise RowError("choices and their labels differ in number", value, "one label for each choice")
    return read


def _of_key(
    value: Any, texts: list[str], labels: list[str], columns: list[str], *, from_zero: bool
) -> tuple[int | None, Unsure | None]:
    """A letter, a label, the text itself, the name of the choice's column, or a number."""
    spelled = str(value).strip().removesuffix(".0")
    for known in ([label.casefold() for label in labels], [normal(text) for text in texts]):
        if known.count(normal(spelled)) == 1:
            return known.index(normal(spelled)), None
    if not labels and (letter := _LETTER.fullmatch(spelled)):
        place = _PLACES[letter[1].lower()][1]
        return (place, None) if place < len(texts) else (None, None)
    if not labels and column_name(spelled) in columns:
        return columns.index(column_name(spelled)), None
    if labels and (letter := _LETTER.fullmatch(spelled)) and letter[1].casefold() in [one.casefold() for one in labels]:
        return [one.casefold() for one in labels].index(letter[1].casefold()), None
    if (both := _LETTER_AND_TEXT.fullmatch(spelled)) and (place := _PLACES[both[1].lower()][1]) < len(texts):
        return (place, None) if normal(both[2]) == normal(texts[place]) else (None, None)
    if not re.fullmatch(r"-?\d{1,3}", spelled) or isinstance(value, bool):
        return None, None
    number = int(spelled)
    if from_zero:
        return _in_range(number, texts, 0), None
    return (None, (number, len(texts))) if 0 <= number <= len(texts) else (None, None)


def _in_range(index: Any, choices: list[str], base: int) -> int:
    try:
        number = int(str(index).strip().removesuffix(".0")) - base
    except ValueError:
        number = -1
    if not 0 <= number < len(choices) or isinstance(index, bool):
        what = "answer_index out of range" if not base else "answer_number out of range"
        fix = f"{base} to {len(choices) - 1 + base}: it counts from {base}"
        other = "" if base else "; if yours counts from 1: --data.columns answer_number=COLUMN"
        raise RowError(what, index, fix + other)
    return number
