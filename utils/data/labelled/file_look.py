"""What only a whole file of labelled pairs shows: letters without choices, a chat template's marks, damaged texts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from utils.data.example_formats import Read
from utils.data.labelled.choices import ORDERS

# what a chat template writes; in a row it is text that the template would wrap once more
_CHAT_MARKS = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:start|end)_header_id\|>|<\|eot_id\|>|<(?:start|end)_of_turn>|\[/?INST\]|\]~b\]|"
    r"<\|(?:user|assistant|system|end)\|>|^###? ?(?:Instruction|Human|Response|Assistant):|^(?:Human|Assistant): ",
    re.MULTILINE,
)
_WRITTEN_LIST = re.compile(r"\[\s*(['\"]).*\1\s*\]", re.DOTALL)
_LETTER = re.compile(rf"[(（]?[{''.join(ORDERS[:3])}][)）]?[.):]?", re.IGNORECASE)
# what programs write for an empty cell
_NOTHING = re.compile(r"nan|none|null|n/a|#n/a|#ref!|#value!|#name\?|undefined", re.IGNORECASE)
# HTML's own tags and entities; <T> and a < b are code
_HTML = re.compile(
    r"</?(?:p|br|div|span|b|i|u|em|strong|ul|ol|li|a|font|img|h[1-6]|table|td)(?:\s[^<>]*)?/?>|&(?:amp|nbsp|lt|gt|quot|#\d+);"
)
# UTF-8 that was read as Latin-1 or cp1252: two bytes of it are such a pair
_MOJIBAKE = re.compile("[ÃÂ][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€[\u0080-\u00bf™œ“”˜¦¢]")
_PICTURE = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")
NOTES: tuple[tuple[re.Pattern[str], str], ...] = (
    (_HTML, "HTML stands in the text, and is trained as it is written"),
    (_MOJIBAKE, "UTF-8 that was read in another encoding stands in the text (\u00c3\u00a4 for \u00e4)"),
    (_PICTURE, "a picture in base64 stands in the text, and is trained as text"),
)


class ProblemSink(Protocol):
    """Takes one problem of a file."""

    def add(self, what: str, value: object = None, fix: str = "") -> None: ...


def look_at_file(source: str, kept: Sequence[tuple[str, Read]], notes: Counter[str], problems: ProblemSink) -> None:
    """Complain of what makes a file mean something else, and count in `notes` what a person should know of it."""
    if not kept:
        return
    letters = [read for _, read in kept if not read.fields["choices"] and _is_letter(read.fields)]
    lists = Counter(name for read in letters for name in read.lists)
    if len(letters) == len(kept) and lists:
        column = lists.most_common(1)[0][0]
        what = f"{source}: every answer is a letter, and no column was read as the choices"
        fix = f"say which column holds them: --data.columns choices={column}; or ignore={column}"
        problems.add(what, list(lists), fix)
    elif letters and len(letters) == len(kept):
        notes["the answer is a single letter, and the row has no choices"] += len(letters)
    written = [(place, m[0]) for place, read in kept if (m := _first_match(_CHAT_MARKS, _texts(read.fields)))]
    if 2 * len(written) > len(kept):
        place, mark = written[0]
        fix = "give the text without them, or `messages`: the chat template writes its own"
        problems.add(f"{place}: {len(written):,} of {len(kept):,} rows hold the marks of a chat", mark, fix)
    elif written:
        notes["marks of a chat stand in the text, and are trained as text"] += len(written)
    for pattern, note in NOTES:
        _count(notes, note, kept, lambda read, pattern=pattern: _first_match(pattern, _texts(read.fields)))
    _count(
        notes,
        "an answer looks like a list that was written as text; several answers are a JSON list",
        kept,
        lambda read: any(_WRITTEN_LIST.fullmatch(answer) for answer in read.fields["answers"]),
    )
    _count(
        notes,
        "an answer is what programs write for an empty cell (nan, None, #N/A)",
        kept,
        lambda read: not read.fields["choices"] and any(_NOTHING.fullmatch(a) for a in read.fields["answers"]),
    )
    answers_of: dict[int, set[int]] = {}
    for _, read in kept:
        own = {key: value for key, value in read.fields.items() if key not in ("answers", "reasoning", "tool_calls")}
        answers_of.setdefault(hash(json.dumps(own, sort_keys=True)), set()).add(hash(tuple(read.fields["answers"])))
    if several := sum(len(answers) for answers in answers_of.values() if len(answers) > 1):
        notes["the same question, with another answer in another row"] += several
    counted = [read for _, read in kept if read.fields["answer_index"] is not None]
    if len(counted) >= 20 and all(read.fields["answer_index"] for read in counted):
        used = {name for read in counted for name, role in read.used.items() if role == "answer_index"}
        if used and "answer_number" not in used:
            notes["no right choice has the index 0: if yours count from 1, --data.columns answer_number=COLUMN"] += 1


def _count(notes: Counter[str], note: str, kept: Sequence[tuple[str, Read]], is_so: Callable[[Read], object]) -> None:
    if number := sum(bool(is_so(read)) for _, read in kept):
        notes[note] += number


def _first_match(pattern: re.Pattern[str], texts: Iterator[str]) -> re.Match[str] | None:
    return next((match for text in texts if (match := pattern.search(text))), None)


def _is_letter(fields: dict[str, Any]) -> bool:
    return len(fields["answers"]) == 1 and bool(_LETTER.fullmatch(fields["answers"][0]))


def _texts(fields: dict[str, Any]) -> Iterator[str]:
    yield fields["question"]
    yield from fields["answers"]
