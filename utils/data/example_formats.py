"""The shapes in which people keep labelled examples, each turned into the one the pipeline knows.

Pure: one row (a dict of columns) in, the common fields out, with what each column was read as. Raises RowError for a
row that is wrong, LeftOutError for one that is right and not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.data.labelled import choices, conversation_formats, marks, values
from utils.data.labelled.choices import Unsure
from utils.data.labelled.column_roles import ColumnMap, Row, has_name_of
from utils.data.labelled.conversation_formats import Turn, read_turns
from utils.data.labelled.nested import is_of_rows, unfolded, wrapper
from utils.data.labelled.row_text import (
    LeftOutError,
    RowError,
    UnanswerableError,
    is_missing,
    is_visible,
    only_thoughts,
    split_thinking,
    text_of,
)
from utils.models.chat import UNTRAINED

__all__ = ["ACCEPTED", "Columns", "LeftOutError", "Read", "RowError", "UnanswerableError", "read_row", "to_common"]

Columns = dict[str, Any]
ACCEPTED = (
    "question + answers or answer (+ context, choices, answer_index; SQuAD, ARC, MMLU, Dolly, OpenOrca too); "
    "instruction + input + output; prompt + completion (text or messages); messages [{role, content}]; "
    "conversations [{from, value}]"
)


@dataclass(frozen=True)
class Read:
    """One row in the common form, and how it was read.

    `used` is column -> role, `lists` the columns of lists that were not read. `unsure` is a right choice that may count
    from 0 or 1, `label` a column of 0 and 1 that may be a mark: what both mean is seen in the whole file.
    """

    shape: str
    fields: Columns
    used: dict[str, str]
    unused: list[str]
    notes: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    unsure: Unsure | None = None
    label: bool | None = None


def to_common(row: Mapping[str, Any], column_map: ColumnMap | None = None) -> tuple[str, Columns]:
    """The name of the row's shape and its common fields without `id` and `document`; raises as `read_row` does."""
    read = read_row(row, column_map)
    return read.shape, read.fields


def read_row(columns: Mapping[str, Any], column_map: ColumnMap | None = None) -> Read:
    """Read one row by its own columns, or by what the person said of them.

    Raises RowError (unknown shape, no question, no or empty answers, bad choices or index, contradicting marks),
    LeftOutError (marked as not to be trained, a picture) or UnanswerableError.
    """
    row = Row(columns, column_map)
    label = marks.check_row(row, has_choices=choices.are_there(row))
    unsure = None
    if turns := _turns_of(row):
        shape, fields = turns[0], _from_turns(row, turns[1])
    else:
        shape, fields, unsure = _from_pair(row)
    lists = [name for name in row.unused() if _is_list(row.values[name])]
    return Read(shape, fields, dict(row.used), row.unused(), row.notes, lists, unsure, label)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, dict)) or (isinstance(value, str) and value.lstrip().startswith(("[", "{")))


def expand(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each question in SQuAD's published form (articles, paragraphs, questions), else the row itself.

    An object around a list of rows (`data`, `examples`, ...) gives those rows, with its context; columns that lie in
    objects (LangSmith's `inputs` and `outputs`) become columns of the row.
    """
    paragraphs = values.get("paragraphs")
    if isinstance(paragraphs, list) and paragraphs and all(isinstance(p, dict) and "qas" in p for p in paragraphs):
        for number, paragraph in enumerate(paragraphs, 1):
            for place, question in enumerate(paragraph["qas"] if isinstance(paragraph["qas"], list) else [], 1):
                if isinstance(question, dict):
                    shared = {"title": values.get("title"), "context": paragraph.get("context")}
                    yield f", paragraph {number}, question {place}", shared | question
        return
    if (name := wrapper(values)) is not None:
        shared = {key: value for key, value in values.items() if key != name and is_of_rows(key)}
        for number, item in enumerate(values[name], 1):
            # the datasets server wraps each row once more
            item = item["row"] if isinstance(item.get("row"), dict) else item
            for place, row in expand(shared | item):
                yield f", {name} {number}{place}", row
        return
    yield "", unfolded(values)


def _turns_of(row: Row) -> tuple[str, list[Turn]] | None:
    """(shape, turns) of a row that holds a conversation; None for one that holds a question and an answer."""
    if names := row.filled("messages"):
        turns = read_turns(row.value("messages"), row.notes)
        if turns and turns[-1]["role"] != "assistant" and (answers := row.filled("answer")):
            turns += _completion(row.value("answer"), answers[0], row.notes)
        elif turns and turns[-1]["role"] != "assistant" and (error := marks.preference(row)):
            raise error  # the answer is one of the two
        return "sharegpt" if names[0].startswith("conversation") else "messages", turns
    questions = row.filled("question")
    answers = row.filled("answer")
    lists = [name for name in (*questions, *answers) if _are_turns(row.values[name])]
    if not lists or not questions:
        return None
    prompt = row.value("question")
    turns = read_turns(
        prompt if _are_turns(prompt) else [{"role": "user", "content": text_of(prompt, "question")}], row.notes
    )
    if not answers:
        if error := marks.preference(row):
            raise error
        return "prompt", turns
    return "prompt", turns + _completion(row.value("answer"), answers[0], row.notes)


def _are_turns(value: object) -> bool:
    keys = ("role", "from", "content")
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(t, dict) and any(k in t for k in keys) for t in value)
    )


def _completion(value: object, column: str, notes: list[str]) -> list[Turn]:
    if isinstance(value, dict) and _are_turns([value]):
        value = [value]
    if _are_turns(value):
        return read_turns(value, notes)
    return read_turns([{"role": "assistant", "content": text_of(values.single(value, column), "answer")}], notes)


def _from_turns(row: Row, turns: list[Turn]) -> Columns:
    """The last trained assistant turn is the answer, what stands before it its prompt; what follows it is cut."""
    answered = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answered:
        raise RowError("no answer: there is no assistant turn", [t["role"] for t in turns], "end with the answer")
    trained = [i for i in answered if not turns[i].get(UNTRAINED)]
    if not trained:
        raise LeftOutError(marks.UNTRAINED)
    last = trained[-1]
    if any(turn["content"] or turn.get("tool_calls") for turn in turns[last + 1 :]):
        row.notes.append("turns after the last answer that is trained: cut")
    system_texts = [turn["content"] for turn in turns[: last + 1] if turn["role"] == "system"]
    before = [turn for turn in turns[:last] if turn["role"] != "system"]
    question = max((i for i, turn in enumerate(before) if turn["role"] == "user"), default=None)
    if question is None or before[-1]["role"] == "assistant":
        role = before[-1]["role"] if before else "nothing"
        what = "no question: the turn before the last answer is not the user's"
        raise RowError(what, role, "put a user turn there, or join two turns of the assistant")
    if before[question]["content"] == "":
        raise RowError("no question", fix="write the question, or delete the row")
    answer = turns[last]
    fields = _common(
        row,
        before[question]["content"],
        [answer["content"]],
        reasoning=answer.get("reasoning_content"),
        calls=answer.get("tool_calls"),
    )
    own = fields["system"]
    fields["system"] = "\n\n".join(dict.fromkeys([*([own] if own else []), *system_texts])) or None
    fields["history"] = [*fields["history"], *before[:question]]
    if before[question + 1 :]:
        fields["tool_turns"] = before[question + 1 :]
    return fields


def _from_pair(row: Row) -> tuple[str, Columns, Unsure | None]:
    shape, question = values.question_of(row)
    marked = choices.flagged(row)
    texts, labels, columns = (marked[0], list[str](), "") if marked else choices.read_choices(row)
    wrong = choices.wrong_answers(row) if texts is None else []
    names = row.filled("answer")
    # A to D may stand for the answers of a choice, and `answer` is then their key
    answers = row.value("answer") if names else None
    if marked and names in ([], ["answers"]):
        answers = marked[1]
    is_squad = isinstance(answers, dict) and "text" in answers
    answers = values.accepted(row, answers, names[0] if names else "")
    if texts is None:
        for name in ("answer_index", "answer_number"):
            if name in row.column_map.columns or row.has(name):
                value = row.peek(name) if row.has(name) else row.value(name)
                raise RowError(f"{name} without choices", value, f"give `choices`, or leave {name} out")
        if wrong and answers:
            right = text_of(answers[0] if isinstance(answers, list) else answers, "answer")
            texts = list(dict.fromkeys([right, *wrong]))
    index = unsure = None
    if texts is not None and not wrong:
        index, unsure, is_key = choices.right_choice(row, texts, labels, answers, columns)
        if is_key and index is not None:
            answers = texts[index]
        elif is_key and unsure is not None:
            answers = texts[0]  # the file decides which one it is
        elif unsure is not None:
            unsure = None  # the answer in words says it
    if is_missing(question) or is_missing(answers):
        raise _explain(row, question)
    fields = _common(row, values.question_text(question), answers, texts=texts, index=0 if unsure else index)
    if shape == "question":
        shape = "squad" if is_squad else "question with choices" if texts is not None else shape
    return shape, fields, unsure


def _common(
    row: Row,
    question: str,
    answers: Any,
    *,
    texts: list[str] | None = None,
    index: int | None = None,
    reasoning: str | None = None,
    calls: list[dict[str, Any]] | None = None,
) -> Columns:
    tools = conversation_formats.read_tools(row.value("tools"))
    if tools and not calls and (calls := conversation_formats.calls_in(answers)):
        answers = [""]
    accepted: list[str] = []
    for item in answers if isinstance(answers, list) else [answers]:
        thought, text = split_thinking(text_of(item, "answer"))
        if not is_visible(text) and not calls:
            raise RowError("empty answer", item, "write the answer, or delete the row")
        reasoning = reasoning or thought
        accepted.append(marks.check_media(text))
    if texts is not None:
        index = choices.match(texts, accepted, index)
    own = row.value("reasoning")
    system = row.value("system")
    if isinstance(system, dict) and isinstance(system.get("parts"), list):  # Gemini
        system = system["parts"]
    system = "\n\n".join(text_of(one, "system") for one in (system if isinstance(system, list) else [system]) if one)
    history = row.value("history")
    return {
        "system": system or None,
        "history": [] if is_missing(history) else read_turns(history, row.notes),
        "question": question,
        "context": values.context_of(row),
        "reasoning": reasoning or (None if is_missing(own) else only_thoughts(text_of(own, "reasoning"))),
        "answers": list(dict.fromkeys(accepted)),
        "choices": texts,
        "answer_index": index,
        **({"tools": tools} if tools else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _explain(row: Row, question: object) -> RowError:
    """What is wrong with a row that has no question or no answer: a cell is empty, or no column is known as one."""
    if is_missing(question) and row.is_named("question"):
        return RowError("no question", fix="write the question, or delete the row")
    if not is_missing(question) and row.is_named("answer"):
        blank = any(isinstance(value, str) for name, value in row.values.items() if row.role_of(name) == "answer")
        fix = "give `answers`, a list of accepted answers, or `answer`; or delete the row"
        return RowError("empty answer" if blank else "no answers", fix=fix)
    if error := marks.preference(row):
        return error
    texts = [name for name in row.values if row.role_of(name) == "messages" and isinstance(row.values[name], str)]
    if texts and row.has(texts[0]):
        fix = 'write [{"role": "user", "content": "..."}, ...]; a text would be trained with who says it'
        return RowError(f"`{texts[0]}` is one text, and no list of turns", row.values[texts[0]], fix, of_file=True)
    if row.is_named("messages"):
        return RowError("no messages", fix="write the conversation, or delete the row")
    listed = f"columns {', '.join(row.values) or '(none)'}"
    if any(name.endswith(("?", "？", "؟")) for name in row.values):
        fix = "write a line of names above it, as question,answer: the first line of a table is never a pair"
        return RowError(
            "the first line is read as the names of the columns, and is a question", listed, fix, of_file=True
        )
    missing = [role for role, value in (("question", question), ("answer", row.filled("answer"))) if is_missing(value)]
    likely = _likely(row, missing)
    mapped = ",".join(f"{role}={columns[0]}" for role, columns in likely.items())
    others = " or ".join(f"{role}={name}" for role, columns in likely.items() for name in columns[1:3])
    fix = "nearest shape: question + answer; say which columns they are: --data.columns "
    fix = f"{fix}{mapped}{f' (it may be {others})' if others else ''}; " if mapped else ""
    what = {"question": "no question", "answer": "no answers"}[missing[0]] if len(missing) == 1 else "unknown shape"
    # with nothing else in the row there is no column to name
    return RowError(
        what, listed if mapped or len(missing) > 1 or row.unused() else None, f"{fix}accepted: {ACCEPTED}", of_file=True
    )


def _likely(row: Row, missing: list[str]) -> dict[str, list[str]]:
    """Role -> columns of text that nothing was read from: those whose name has one of the role's names in it, for the
    question those that ask, else all, the likeliest first; more than one where they are equally likely."""
    texts = [n for n in row.unused() if isinstance(row.values[n], str) and n not in ("", "id", "text")]
    texts.sort(key=lambda name: not any(map(str.isalpha, str(row.values[name]))))  # numbers say what a row is
    candidates: dict[str, list[str]] = {}
    for role in missing:
        taken = [columns[0] for columns in candidates.values()]
        named = [name for name in row.unused() if name not in taken and has_name_of(role, name)]
        asking = [name for name in texts if str(row.values[name]).rstrip().endswith(("?", "？", "؟"))]
        in_order = texts if "question" in missing else texts[::-1]  # an answer stands behind its question
        if role == "question":
            named = [name for name in named if name in asking] or named or asking
        if of_role := named or in_order:
            candidates[role] = of_role
            texts = [name for name in texts if name != of_role[0]]
    return candidates
