"""Marks that say what of a row must not be trained: loss flags, KTO's labels, preferences, pictures. Pure.

A mark is obeyed (the turn stays context, the row is left out and counted) or refused; it is never passed over.
"""

from __future__ import annotations

import re
from typing import Any

from utils.data.labelled.column_roles import Row
from utils.data.labelled.row_text import LeftOutError, RowError, is_missing, is_number, normal, truth

# OpenAI; axolotl, ms-swift and others
TURN_MARKS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale", "label")
ROW_MARKS = ("weight", "train", "trainable", "train_on_row", "loss")
LABELS = ("label", "kto_tag", "is_correct", "correct", "is_right", "accepted", "is_accepted", "is_answer")
LABELS += ("approved", "is_approved", "valid", "is_valid", "verified", "is_verified", "is_good", "keep", "include")
# true there is what false is in LABELS
REFUSALS = ("discarded", "deleted", "is_deleted", "excluded", "exclude", "skip", "was_cancelled", "is_wrong", "is_bad")
# columns of feedback and review say it in words
VERDICTS = ("label", "kto_tag", "status", "response_status", "review_status", "review", "feedback", "verdict")
VERDICTS += ("judgement", "judgment", "decision", "thumbs", "quality")
_GOOD = ("good", "correct", "right", "accept", "accepted", "approved", "approve", "chosen", "desirable", "thumbs_up")
_GOOD += ("thumbsup", "up", "like", "liked", "upvote", "👍", "valid", "keep", "pass", "passed")
_BAD = ("bad", "incorrect", "wrong", "reject", "rejected", "disapproved", "undesirable", "thumbs_down", "thumbsdown")
_BAD += (
    "down",
    "dislike",
    "disliked",
    "downvote",
    "👎",
    "invalid",
    "discard",
    "discarded",
    "fail",
    "failed",
    "deleted",
)
REJECTED = (
    "rejected",
    "rejected_response",
    "rejected_answer",
    "rejected_responses",
    "response_rejected",
    "dispreferred",
    "non_preferred_output",
    "worse",
)
CHOSEN = ("chosen", "chosen_response", "chosen_answer", "response_chosen", "preferred", "preferred_output", "better")
# two outputs side by side; which one is better another column says, or nobody
_RIVAL = re.compile(r"(response|output|completion|answer|reply|human_ref)_?([ab01jk2])")
MEDIA = ("image", "images", "image_path", "image_url", "img", "audio", "audios", "audio_path", "video", "videos")
PICTURES = "a picture, sound or film, which a text model cannot read"
FALSE_LABEL = "marked as a wrong answer"
UNTRAINED = "marked as not to be trained"
_PLACEHOLDER = r"<\|?(?:image|img|audio|video)(?:_\d+|_pad)?\|?>"
_INSIDE = re.compile(r"<(?P<tag>img|image|audio|video)>[^<>\s]+</(?P=tag)>")
# hh-rlhf: the whole conversation in one text
_TRANSCRIPT = re.compile(r"\s*(?:human|user|question)\s*:", re.IGNORECASE)
_AT_AN_END = re.compile(rf"\s*{_PLACEHOLDER}.*|.*{_PLACEHOLDER}\s*", re.DOTALL | re.IGNORECASE)


def is_untrained(turn: dict[str, Any]) -> bool:
    """Whether a turn says that it is not to be trained. Raises RowError for a mark that is neither yes nor no."""
    if not is_missing(turn.get("train_detail")):
        raise RowError("train_detail marks parts of a turn", turn["train_detail"], "a turn is trained whole, or not")
    values = {truth(turn[name]) for name in TURN_MARKS if name in turn and turn[name] is not None}
    masks = [turn[name] for name in ("mask", "masked") if not is_missing(turn.get(name))]
    # of a mask of numbers nobody can say which one is trained
    values |= {not mask if isinstance(mask, bool) else None for mask in masks}
    if None in values:
        marks = {name: turn[name] for name in (*TURN_MARKS, "mask", "masked") if name in turn}
        raise RowError("a turn's mark is neither 0 nor 1", marks, "write 0 or 1: a turn is trained whole, or not")
    if len(values) > 1:
        raise RowError("a turn's marks contradict each other", {n: turn[n] for n in TURN_MARKS if n in turn})
    return values == {False}


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
        elif name == "label" and str(value).strip() in ("0", "1", "0.0", "1.0"):
            unsure = truth(value)
    for name in REFUSALS:
        if isinstance(value := row.peek(name), bool) or str(value).strip().lower() in ("true", "false"):
            row.used[name] = "mark"
            if truth(value):
                raise LeftOutError(FALSE_LABEL)
    for name in () if has_choices else VERDICTS:
        word = str(row.peek(name)).strip().lower().replace(" ", "_").replace("-", "_")
        # where the verdict is what is asked for, it is the answer, too
        if word in (*_GOOD, *_BAD) and not any(
            normal(str(row.values[n])) == normal(word) for n in row.filled("answer")
        ):
            row.used[name] = "mark"
            if word in _BAD:
                raise LeftOutError(FALSE_LABEL)
    return unsure


def preference(row: Row) -> RowError | None:
    """What to say about a row of preference data that names no answer of its own; None for any other row."""
    better = next((name for name in CHOSEN if row.has(name)), None)
    worse = next((name for name in REJECTED if row.has(name)), None)
    if better is None and worse is None:
        rivals: dict[str, list[str]] = {}
        for name in row.values:
            if (match := _RIVAL.fullmatch(name)) and row.has(name):
                rivals.setdefault(match[1], []).append(name)
        if not (two := next((names for names in rivals.values() if len(names) > 1), None)):
            return None
        fix = "keep the right one of each row in a column `answer`; to train one of the columns: --data.columns answer="
        return RowError(
            "rival answers, as preferences have them", f"columns {', '.join(two)}", fix + two[0], of_file=True
        )
    listed = ", ".join(row.values)
    fix = "preferences are not trained; "
    if better and isinstance(row.values[better], str) and _TRANSCRIPT.match(row.values[better]):
        fix += f"to train the better answers alone, write the turns of `{better}` as `messages` [{{role, content}}]"
    elif better:
        turns = row.values[better] if isinstance(row.values[better], list) else []
        is_whole = any(isinstance(turn, dict) and len(turns) > 1 for turn in turns)
        role = "messages" if is_whole else "answer"
        fix += f"to train the better answers alone: --data.columns {role}={better}"
    return RowError("preference data", f"columns {listed}", fix, of_file=True)


def check_media(text: str) -> str:
    """The text. Raises LeftOutError for a picture's placeholder at one of its ends, or its path between two tags."""
    if "<" in text and (_AT_AN_END.fullmatch(text) or _INSIDE.search(text)):
        raise LeftOutError(PICTURES)
    return text
