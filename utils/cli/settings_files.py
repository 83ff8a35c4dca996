"""`--config FILE`: settings from YAML, JSON or TOML, also from a run's own config.json; and how one is written.

A file holds sections, as config.py has them, or dotted names: `task: {lora: {rank: 32}}` and `task.lora.rank: 32` mean
the same. Its `preset` is where the rest starts from. Of several files the last one wins.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import config as settings
from utils import flags
from utils.exceptions import Problem, did_you_mean, path_fix

FLAG = "--config"
PRINT = "--print-config"
PRESET = "preset"
# in a run's config.json: where its values came from, which is no setting
_NO_SETTING = ("overrides",)


def taken_from(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that `--config` names, in order, and the arguments without them."""
    files, rest, waiting = [], [], list(arguments)
    while waiting:
        word = waiting.pop(0)
        if word.startswith(f"{FLAG}="):
            files.append(word.partition("=")[2])
        elif word == FLAG:
            taken = 0
            while waiting and not waiting[0].startswith("--"):
                files.append(waiting.pop(0))
                taken += 1
            if not taken:
                files.append("")
        else:
            rest.append(word)
    return files, rest


def read(names: Sequence[str], problems: list[Problem]) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(preset or "", setting -> value, setting -> "file NAME"); what cannot be used becomes a problem."""
    preset, values, sources = "", {}, {}
    for name in names:
        for path, value in _settings(name, problems):
            if path == PRESET:
                preset = str(value)
            else:
                values[path], sources[path] = value, f"file {name}"
    return preset, values, sources


def as_yaml(config: settings.Config, sections: Sequence[str]) -> str:
    """These sections as a file that `--config` reads."""
    import yaml

    chosen = {PRESET: config.preset} | {name: config.model_dump(mode="json")[name] for name in sections}
    return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)


def _settings(name: str, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    path = Path(name).expanduser()
    if not name or not path.is_file():
        fix = path_fix(name) if name else f"write {FLAG} FILE.yaml"
        problems.append(Problem(f"{FLAG}: there is no such file", name or "(nothing)", fix))
        return
    try:
        content = _parsed(path)
    except (ValueError, OSError, RecursionError) as error:
        problems.append(Problem(f"{FLAG}: the file cannot be read: {' '.join(str(error).split())}", name))
        return
    if not isinstance(content, Mapping):
        what = f"{FLAG}: sections with settings are expected, this is a {type(content).__name__}"
        problems.append(Problem(what, name, f"{PRINT} shows what a file looks like"))
        return
    known = flags.fields()
    # nobody typed the names of a run's own file
    former = flags.RENAMED if set(_NO_SETTING) <= set(content) else {}
    for written, value in _flat({k: v for k, v in content.items() if k not in _NO_SETTING}):
        key = former.get(written, written)
        if key in known or key == PRESET:
            yield key, value
        elif new := flags.RENAMED.get(key):
            problems.append(Problem(f"{name}: {key} was renamed to {new}", fix=f"write {new} there"))
        else:
            fix = did_you_mean(key, [*known, PRESET]) or flags.help_command("all")
            if any(path.startswith(f"{key}.") for path in known):
                fix = f"{key} is a section: write its settings below it"
            problems.append(Problem(f"unknown setting in {name}", key, fix))


def _parsed(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        return json.loads(text)
    if path.suffix.lower() == ".toml":
        return tomllib.loads(text)
    return _yaml(text) or {}


def _yaml(text: str) -> Any:
    """YAML by the scalars of its version 1.2: `on`, `off`, `no` and a date are text, as they are behind a flag.

    PyYAML reads 1.1, in which `task: {on: base}` has the key True.
    """
    import yaml

    class Core(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
        ("merge", r"<<", "<"),
    ):
        Core.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first))
    try:
        return yaml.load(text, Loader=Core)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"task": {"lora": {"rank": 8}}} -> ("task.lora.rank", 8)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
