"""Extraction to JSON: whether an answer is valid, and how many of its fields are right.

The schema is a person's own, or follows from the training answers: the keys that all of them have are required, types
are those that were seen, and keys that none has are not allowed; where dev answers break that, only the types remain.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.data.answer_metrics import normalised
from utils.exceptions import ArtefactError, ConfigError, Problem


def parsed(text: str) -> Any:
    """The JSON object or list that a text is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def field_f1(text: str, golds: Sequence[str]) -> float:
    """F1 over fields, that is paths with their values after normalisation; the order of lists does not count."""
    value = parsed(text)
    if value is None:
        return 0.0
    own = Counter(_fields(value))
    return max((_f1(own, Counter(_fields(gold))) for one in golds if (gold := parsed(one)) is not None), default=0.0)


def is_valid(text: str, schema: Mapping[str, Any]) -> bool:
    """Whether a text is JSON of this schema and nothing else."""
    from jsonschema import Draft202012Validator

    value = parsed(text)
    return value is not None and Draft202012Validator(schema).is_valid(value)


def schema_of(training: Sequence[str], dev: Sequence[str] = ()) -> dict[str, Any]:
    """The schema that the training answers have in common, loosened where a dev answer breaks it."""
    values = [value for text in training if (value := parsed(text)) is not None]
    strict = _common(values, strict=True)
    if all(is_valid(text, strict) for text in dev):
        return strict
    return _common(values, strict=False)


def read_schema(path: Path) -> dict[str, Any]:
    """A person's own schema. Raises ConfigError when it is none."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    fix = "give a JSON schema (json-schema.org, draft 2020-12)"
    try:
        schema = files.read_object(path)
        Draft202012Validator.check_schema(schema)
    except ArtefactError as error:
        raise ConfigError(Problem(f"evaluate.json_schema: {error.problems[0].what}", str(path), fix)) from error
    except SchemaError as error:
        raise ConfigError(Problem(f"evaluate.json_schema: {error.message}", str(path), fix)) from error
    return schema


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _fields(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner, f"{path}[]")
    else:
        text = json.dumps(value) if not isinstance(value, str) else normalised(value) or value
        yield path, text


def _f1(prediction: Counter[tuple[str, str]], gold: Counter[tuple[str, str]]) -> float:
    total = prediction.total() + gold.total()
    return 2 * (prediction & gold).total() / total if total else 1.0


def _common(values: Sequence[Any], *, strict: bool) -> dict[str, Any]:
    types = sorted({_type(value) for value in values})
    if "number" in types and "integer" in types:
        types.remove("integer")
    schema: dict[str, Any] = {"type": types[0] if len(types) == 1 else types} if types else {}
    objects = [value for value in values if isinstance(value, dict)]
    if objects:
        keys = dict.fromkeys(key for value in objects for key in value)
        schema["properties"] = {
            key: _common([value[key] for value in objects if key in value], strict=strict) for key in keys
        }
        if strict:
            schema["required"] = [key for key in keys if all(key in value for value in objects)]
            schema["additionalProperties"] = False
    items = [inner for value in values if isinstance(value, list) for inner in value]
    if items:
        schema["items"] = _common(items, strict=strict)
    return schema


def _type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]
