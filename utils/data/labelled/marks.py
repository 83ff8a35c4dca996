"""Marks that say what of a row must not be trained: loss flags, KTO's labels, preferences, pictures. Pure.

A mark is obeyed (the turn stays context, the row is left out and counted) or refused; it is never passed over.
"""

from __future__ import annotations

import re
from typing import Any

from utils.data.labelled.roles import Row
from utils.data.labelled.row_text import LeftOutError, RowError, is_missing, is_number, truth

# OpenAI; axolotl, ms-swift and others
TURN_MARKS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale", "label")
ROW_MARKS = ("weight", "train", "trainable", "train_on_row", "loss")
LABELS = ("label", "kto_tag", "is_correct", "correct", "is_right", "accepted", "is_accepted", "is_answer")
REJECTED = (
    "rejected",
    "rejected_response",
    "rejected_answer",
    "rejected_responses",
    "response_rejected",
    "dispreferred",
)
CHOSEN = ("chosen", "chosen_response", "chosen_answer", "response_chosen", "preferred")
MEDIA = ("image", "images", "image_path", "image_url", "img", "audio", "audios", "audio_path", "video", "videos")
PICTURES = "a picture, sound or film, which a text model cannot read"
FALSE_LABEL = "marked as a wrong answer"
UNTRAINED = "marked as not to be trained"
_PLACEHOLDER = r"<\|?(?:image|img|audio|video)(?:_\d+|_pad)?\|?>"
_AT_AN_END = re.compile(rf"\s*{_PLACEHOLDER}.*|.*{_PLACEHOLDER}\s*", re.DOTALL | re.IGNORECASE)


def is_untrained(turn: dict[str, Any]) -> bool:
    """Whether a turn says that it is not to be trained. Raises RowError for a mark that is neither yes nor no."""
    if not is_missing(turn.get("train_detail")):
        raise RowError("train_detail marks parts of a turn", turn["train_detail"], "a turn is trained whole, or not")
    found = {truth(turn[name]) for name in TURN_MARKS if name in turn and turn[name] is not None}
    masks = [turn[name] for name in ("mask", "masked") if not is_missing(turn.get(name))]
    # of a mask of numbers nobody can say which one is trained
    found |= {not mask if isinstance(mask, bool) else None for mask in masks}
    if None in found:
        marks = {name: turn[name] for name in (*TURN_MARKS, "mask", "masked") if name in turn}
        raise RowError("a turn's mark is neither 0 nor 1", marks, "write 0 or 1: a turn is trained whole, or not")
    if len(found) > 1:
        raise RowError("a turn's marks contradict each other", {n: turn[n] for n in TURN_MARKS if n in turn})
    return found == {False}


def check_row(row: Row, *, has_choices: bool) -> bool | None:
    """Obey the marks of a whole row: LeftOutError where it is not to be trained, RowError where that is unclear.

    Returns False or True for a `label` of 0 or 1, which is a mark only if no other number stands in that column.
    """
    if any(row.has(name) for name in MEDIA):
        raise LeftOutError(PICTURES)
    for name in ROW_MARKS:
        value = row.peek(name)
        if isinstance(value, bool) or value in (0, 1) or (isinstance(value, str) and truth(value) is not None):
            row.used[name] = "mark"
            if not truth(value):
                raise LeftOutError(UNTRAINED)
        elif name == "weight" and is_number(value):
            fix = "a row is trained or not; --data.columns ignore=weight trains all of them alike"
            raise RowError("a weight that is neither 0 nor 1", value, fix, of_file=True)
    unsure = None
    for name in LABELS:
        value = None if has_choices and name in ("label", "correct") else row.peek(name)  # there it names the choice
        if isinstance(value, bool) or str(value).strip().lower() in ("true", "false"):
            row.used[name] = "mark"
            if not truth(value):
                raise LeftOutError(FALSE_LABEL)
        elif name == "label" and is_number(value) and value in (0, 1):
            unsure = bool(value)
    return unsure


def preference(row: Row) -> RowError | None:
    """What to say about a row of preference data that names no answer of its own; None for any other row."""
    better = next((name for name in CHOSEN if row.has(name)), None)
    worse = next((name for name in REJECTED if row.has(name)), None)
    if better is None and worse is None:
        return None
    listed = ", ".join(row.values)
    fix = "preferences are not trained; "
    if better:
        role = "messages" if isinstance(row.values[better], list) else "answer"
        fix += f"to train the better answers alone: --data.columns {role}={better}"
    return RowError("preference data", f"columns {listed}", fix, of_file=True)


def check_media(text: str) -> str:
    """The text. Raises LeftOutError when a placeholder of a picture stands at one of its ends."""
    if "<" in text and _AT_AN_END.fullmatch(text):
        raise LeftOutError(PICTURES)
    return text
