"""Columns that lie in an object of a row: LangSmith's `inputs` and `outputs`, ARC's `question`, LangChain's `metadata`.

Pure. The columns of the row itself come first; two objects that name one column are left as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from utils.data.labelled import choices, groups, marks
from utils.data.labelled.column_roles import STRONG, WEAK, are_turns, column_name

_WRAPPERS = ("data", "examples", "rows", "items", "questions", "instances", "results")
# objects whose keys say where a row comes from, and nothing else
_METADATA = ("metadata", "meta", "extra", "extra_info")
# by one of these keys an object is seen to hold columns
_KNOWN = {
    name
    for role in ("question", "answer", "messages")
    for family in (*STRONG[role], *WEAK.get(role, ()))
    for name in family
}
_KNOWN |= set(choices.LISTS)
# a row has one of these
_PAIR = {name for role in ("question", "answer") for family in STRONG[role] for name in family}
# what these hold is what a model is not to learn, or what is read as an object
_WHOLE = {*marks.REJECTED, *marks.CHOSEN, *choices.LISTS, "answers", "prediction", "predictions", "tools", "functions"}


def wrapper(values: Mapping[str, Any]) -> str | None:
    """The column of an object that is a list of rows, by its name or by theirs; None for an object that is a row."""
    lists = [key for key, item in values.items() if isinstance(item, list) and item]
    inside = values[lists[0]] if len(lists) == 1 else []
    if not inside or not all(isinstance(item, dict) for item in inside) or are_turns(inside):
        return None
    own = {column_name(key) for key in values if key != lists[0]}
    if own & _PAIR or column_name(lists[0]) in _WHOLE:
        return None
    is_known = all(_PAIR & {column_name(key) for key in item} for item in inside)
    return lists[0] if is_known or lists[0].lower() in _WRAPPERS else None


def is_of_rows(name: str) -> bool:
    """Whether what stands beside a list of rows belongs to each of them: their context, system text or document."""
    families = (*STRONG["context"], *WEAK["context"], *STRONG["system"], groups.CANDIDATES)
    return any(column_name(name) in family for family in families)


def unfolded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the columns of its objects as columns of its own, where they are known as such."""
    objects = {name: value for name, value in values.items() if isinstance(value, dict) and value}
    if not objects:
        return dict(values)
    own = {column_name(name) for name in values if name not in objects}
    inner = {name: {column_name(key): key for key in value} for name, value in objects.items()}
    shared = Counter(key for name, keys in inner.items() if column_name(name) not in _WHOLE for key in keys)
    columns: dict[str, Any] = {}
    for name, value in values.items():
        keys = inner.get(name, {})
        if column_name(name) in _METADATA:
            taken = [k for k in keys if k in groups.CANDIDATES and k not in own]
            rest = {key: one for key, one in value.items() if column_name(key) not in taken}
            columns |= {key: value[keys[key]] for key in taken} | ({name: rest} if rest else {})
        elif (
            column_name(name) in _WHOLE
            # {"input": 10, "output": 20} are counts
            or not any(k in _KNOWN and isinstance(value[keys[k]], (str, list, dict)) for k in keys)
            or any(k in own or shared[k] > 1 for k in keys)
        ):
            columns[name] = value
        else:
            columns |= {key: value[keys[key]] for key in keys}
    return columns
