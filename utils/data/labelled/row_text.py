"""The texts of a labelled row: cleaned, reasoning split from the answer, and how two of them are compared. Pure."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_THINKING = re.compile(r"\s*<think>(?P<reasoning>.*?)</think>(?P<answer>.*)", re.DOTALL)
# what the log of a server has: the template put <think> into the prompt, and the model closes it on a line of its own
_OPENED_THINKING = re.compile(r"(?P<reasoning>(?:(?!<think>).)*?\n)?</think>\n(?P<answer>.*\S.*)", re.DOTALL)
_THINK_MARK = re.compile(r"</?think>")
_LINE_BREAKS = re.compile(r"\r\n?")
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# letters and patterns that show as a blank (Hangul, Braille)
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"
# at the ends of a text they are left over from copying; inside they part words (Thai) and shape letters (Persian)
_INVISIBLE_ENDS = "\u200b\u200c\u200d\u2060\ufeff\u00ad"


class RowError(ValueError):
    """One thing that is wrong with a row: what, the value to blame, and what to do about it.

    `of_file`: it is the same in every row with these columns, so it is told once.
    """

    def __init__(self, what: str, value: object = None, fix: str = "", *, of_file: bool = False) -> None:
        super().__init__(what)
        self.what, self.value, self.fix, self.of_file = what, value, fix, of_file


class LeftOutError(Exception):
    """A row that is well formed and is not trained on, with the reason under which it is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnanswerableError(LeftOutError):
    """The question has no answer (SQuAD v2), so there is nothing to train or score on."""

    def __init__(self) -> None:
        super().__init__("unanswerable")


def is_missing(value: object) -> bool:
    """None, an empty text, list or object, or NaN, which is how some tools write an empty cell."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value in ([], {}, ()) or (isinstance(value, float) and value != value)


def is_number(value: object) -> bool:
    """An int or a float, and neither a bool nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def text_of(value: object, column: str) -> str:
    """The value as cleaned text without white space around it. Raises RowError for what is no text or number."""
    if isinstance(value, dict) and isinstance(value.get("text"), str):  # original SQuAD: [{"text": ..., ...}]
        value = value["text"]
    if not isinstance(value, str) and not is_number(value):
        what = "empty answer" if value is None and column == "answer" else f"`{column}` is a {type(value).__name__}"
        fix = "write yes or no, or the answer in words" if isinstance(value, bool) else "write a string"
        raise RowError(what, value, fix)
    return clean(str(value))


def clean(text: str) -> str:
    """NFC, `\\n` line ends, C1 bytes as the cp1252 characters they were, no other control characters but tab."""
    text = CONTROLS.sub(_decoded, _LINE_BREAKS.sub("\n", text))
    text = unicodedata.normalize("NFC", text).strip()
    return text.strip(_INVISIBLE_ENDS).strip() if text and {text[0], text[-1]} & set(_INVISIBLE_ENDS) else text


def is_visible(text: str) -> bool:
    """Whether anything of it can be seen: not only blanks, joiners, fillers and other format characters."""
    return any(unicodedata.category(c) not in ("Cf", "Zs", "Zl", "Zp", "Cc") and c not in _FILLERS for c in text)


def normal(text: str) -> str:
    """The text as choices and answers are compared: NFKC, no case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def only_thoughts(text: str | None) -> str | None:
    """Reasoning without the marks around it. Raises RowError for one inside it, which would end the think block."""
    inside = (text or "").strip().removeprefix("<think>").removesuffix("</think>").strip()
    if _THINK_MARK.search(inside):
        raise RowError("a think mark inside the reasoning", inside, "write the reasoning without <think> and </think>")
    return inside or None


def split_thinking(answer: str) -> tuple[str | None, str]:
    """(reasoning, answer) of an answer that holds both. Raises RowError for marks that do not pair."""
    if "think>" not in answer:  # the patterns look at every character of a long answer
        return None, answer
    if match := _THINKING.fullmatch(answer) or _OPENED_THINKING.fullmatch(answer):
        if _THINK_MARK.search(match["answer"]):
            raise RowError("a second think mark in one answer", answer, "one <think>...</think>, then the answer")
        return only_thoughts(match["reasoning"]), match["answer"].strip()
    if answer.startswith("<think>"):
        raise RowError("<think> is never closed", answer, "close it with </think> before the answer")
    return None, answer


def truth(value: Any) -> bool | None:
    """A mark as a bool: true, false, 0, 1 and their texts; None for anything else."""
    spelled = str(value).strip().lower()
    if spelled in ("true", "1", "1.0", "yes"):
        return True
    return False if spelled in ("false", "0", "0.0", "no") else None


def _decoded(match: re.Match[str]) -> str:
    # C1 controls are cp1252 bytes that somebody read as latin-1; C0 controls mean nothing in a text
    return bytes([ord(match[0])]).decode("cp1252", "ignore") if ord(match[0]) >= 0x80 else ""
