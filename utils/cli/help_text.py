"""`--help`: one page with what people need, and every section of settings on demand."""

from __future__ import annotations

import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import config as settings
from utils import flags
from utils.composition import methods
from utils.exceptions import ConfigError, Problem, did_you_mean

USAGE = """\
  --config FILE            settings from a YAML, JSON or TOML file, also a run's config.json; of several the last wins
  --print-config           write such a file, with these settings, to standard output
  --dry-run                print all settings, where each came from and what would be done; do nothing
  -q, -v                   only warnings and results; or what transformers says too
  --help                   this page; --help SECTION (or task.train, or task.lora.rank) one part, --help all everything
  --SECTION.FIELD VALUE    any setting; lists are written a,b,c
Environment: {prefix}SECTION__FIELD=VALUE, for example {example}=32. Flags win over the
environment, and the environment wins over files."""
FLAGS = ("--help", "-h")
ALL = "all"
KINDS: dict[Any, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false"}
BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "multiple_of": "a multiple of {}"}


def topics(arguments: Sequence[str]) -> list[str] | None:
    """What help is asked for: the words after --help; None when it is not asked for."""
    places = [i for i, argument in enumerate(arguments) if argument in FLAGS]
    if not places:
        return None
    words = [argument.removeprefix("--") for argument in arguments[places[0] + 1 :]]
    flagged = [argument.startswith("--") for argument in arguments[places[0] + 1 :]]
    return words[: flagged.index(True)] if True in flagged else words


def page(description: str, sections: Sequence[str], most_used: Sequence[str], topics: Sequence[str]) -> str:
    """The text for these topics: sections, parts of their names, single settings or `all`; without any, the first page.

    Raises ConfigError for a topic that is none.
    """
    if not topics:
        return "\n".join(_first_page(description.strip(), sections, most_used))
    paths = {short: path for path, short in flags.SHORTCUTS.items()}
    lines, problems = [], []
    for topic in topics:
        prefix = paths.get(topic, topic)
        matches = [path for path in flags.fields() if topic == ALL or f"{path}.".startswith(f"{prefix}.")]
        if not matches:
            known = [ALL, *_sections(), *flags.fields(), *paths]
            fix = did_you_mean(topic, known) or f"sections: {', '.join(_sections())}; or all"
            problems.append(Problem("--help: no such section or setting", topic, fix))
        lines += _unfolded(matches)
    if problems:
        raise ConfigError(problems)
    return "\n".join(lines)


def _first_page(description: str, sections: Sequence[str], most_used: Sequence[str]) -> Iterator[str]:
    presets, preset = ", ".join(settings.PRESETS), settings.Config.model_fields["preset"].default
    example = flags.variable("task.lora.rank")
    yield from (description, "")
    yield from _hanging("  --preset NAME            ", f"start from this preset: {presets} (default {preset})")
    yield USAGE.format(prefix=flags.ENV_PREFIX, example=example)
    if most_used:
        yield from ("", "Most used:")
        for path in most_used:
            yield from _setting(path)
    yield from ("", "Sections that this script reads (--help SECTION):")
    for name in sections:
        count, meaning = _sections()[name]
        yield from _hanging(f"  {name:<12}", f"{meaning} Settings: {count}.")
    others = ", ".join(name for name in _sections() if name not in sections)
    yield from _wrapped(f"The sections {others} are accepted too, so one set of flags serves every script.", "")


def _sections() -> dict[str, tuple[int, str]]:
    """Section -> how many settings it has, and the first sentence about it."""
    sections = {}
    for name, field in settings.Config.model_fields.items():
        if count := sum(path.startswith(f"{name}.") for path in flags.fields()):
            meaning = (field.annotation.__doc__ or "").strip().partition("\n\n")[0]
            sections[name] = (count, " ".join(meaning.split()))
    return sections


def _unfolded(paths: Sequence[str]) -> Iterator[str]:
    shown = ""
    for path in paths:
        section = path.split(".")[0]
        if section != shown:
            yield from _hanging(f"{section}: ", _sections()[section][1])
        shown = section
        yield from _setting(path)
        lines = methods.choices().get(path, {})
        for name, meaning in lines.items():
            if meaning:
                yield from _hanging(f"          {name:<14}", meaning)


def _setting(path: str) -> Iterator[str]:
    """Flag, type or choices, default; then what it means."""
    field = flags.fields()[path]
    short = f", --{flags.SHORTCUTS[path]}" if path in flags.SHORTCUTS else ""
    default = flags.shown(flags.value_of(settings.Config(), path))
    default = default.lower() if flags.is_switch(path) else default
    yield from _hanging(f"  --{path}{short} ", f"{_kind(path)}  [default: {default}]", indent=10)
    yield from _wrapped(field.description or "", " " * 6)


def _kind(path: str) -> str:
    """`sum|ties`, `INTEGER >= 1`, `NUMBER,NUMBER,...`."""
    field, kind = flags.fields()[path], flags.type_of(flags.fields()[path])
    if names := methods.choices().get(path):
        one = "|".join(names)
        return f"{one}, ..." if flags.is_list(path) else one
    if flags.is_list(path):
        item, *_ = typing.get_args(kind)
        one = f"{_named(flags.bare(item)[0])},..."
    else:
        one = _named(kind)
    return one + _bounds(flags.bounds_of(field))


def _named(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(str(choice) or '""' for choice in typing.get_args(kind))
    return KINDS[kind]


def _bounds(metadata: Sequence[Any]) -> str:
    values = [
        (text, getattr(bound, name)) for bound in metadata for name, text in BOUNDS.items() if hasattr(bound, name)
    ]
    bounds = [text.format(f"{value:g}" if isinstance(value, float) else value) for text, value in values]
    return f" {' and '.join(bounds)}" if bounds else ""


def _width() -> int:
    return max(60, min(110, shutil.get_terminal_size((100, 24)).columns))


def _hanging(head: str, text: str, indent: int | None = None) -> list[str]:
    """Text after a head; further lines are indented to where it began, or by `indent`."""
    space = " " * (len(head) if indent is None else indent)
    return textwrap.wrap(text, _width(), initial_indent=head, subsequent_indent=space, break_on_hyphens=False)


def _wrapped(text: str, indent: str) -> list[str]:
    return _hanging(indent, " ".join(text.split()))
