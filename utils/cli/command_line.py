"""From flags, environment variables and files to a checked `Config`, or one error with everything that is wrong.

Precedence: flag, then environment variable (`DTA_TASK__LORA__RANK`), then `--config` file, then preset. Names and types
are those of config.py; pydantic reads the texts. A problem is told in the spelling that was typed, with "did you mean".
"""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from pydantic import ValidationError

import config as settings
from utils import flags, secrets
from utils.cli import settings_files
from utils.composition import methods
from utils.exceptions import ConfigError, Problem, did_you_mean
from utils.models.architectures import size_class

PRESET = "preset"
# what pydantic reads as true or false
BOOLEANS = ("true", "false", "t", "f", "yes", "no", "y", "n", "on", "off", "1", "0")
HOLDS_SECRET = "holds what looks like a password or an access token, and settings are written into manifests"


def resolve(arguments: Sequence[str], environment: Mapping[str, str]) -> settings.Config:
    """The configuration asked for by flags, environment and files. Raises ConfigError with every problem."""
    problems: list[Problem] = []
    named, arguments = settings_files.taken_from(arguments)
    filed_preset, filed, filed_from = settings_files.read(named, problems)
    typed = _flags(arguments, problems)
    variables = _variables(environment, problems)
    usual = filed_preset or _preset_by_size(filed, variables, typed) or settings.Config.model_fields[PRESET].default
    name = typed.pop(PRESET, variables.pop(PRESET, [usual]))[0]
    if not (known := name in settings.PRESETS):
        fix = did_you_mean(name, settings.PRESETS) or f"presets: {', '.join(settings.PRESETS)}"
        problems.append(Problem("--preset: no such preset", name, fix))
    preset = settings.PRESETS[name]() if known else settings.Config()
    preset = _without_its_base(preset, _first("base.source", typed, variables, filed))
    sources = filed_from | dict.fromkeys(variables, "environment") | dict.fromkeys(typed, "flag")
    given = _from_files(filed, filed_from, preset, problems)
    given |= {path: value for path, texts in (variables | typed).items() for value in _read(path, texts, problems)}
    # here and not in config.py: what is a secret depends on the environment. A prompt is not written, and may hold any
    problems += [
        Problem(f"--{path} {HOLDS_SECRET}", fix="give it in the environment (HF_TOKEN, WANDB_API_KEY, ...) instead")
        for path, value in given.items()
        if path != "inference.prompt" and secrets.holds_secret(flags.shown(value))
    ]
    if not preset.base.source and "base.source" not in given:
        fix = "--base.source DIRECTORY, or --base.source ORG/NAME --base.revision COMMIT"
        problems.append(Problem(f"--preset {name} is for any base model of its size and names none", fix=fix))
    config = _validated(preset, given, sources, problems, cross_checks=known)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def words_as_flags(arguments: Sequence[str], first: str, others: str = "") -> list[str]:
    """`rm A B --yes` -> `--runs.command rm --runs.names A B --yes`: settings know no other spelling than flags.

    The first word is the setting `first`; those that follow are `others`, or belong to the first.
    """
    # `rm --yes A` means what `rm A --yes` means
    switches = {f"--{short}" for path, short in flags.SHORTCUTS.items() if flags.is_switch(path)}
    front = [
        at
        for at, (word, value) in enumerate(zip_longest(arguments, arguments[1:], fillvalue=""))
        if word in switches and value.lower() not in BOOLEANS  # `--yes false` keeps its value
    ]
    arguments = [*(word for at, word in enumerate(arguments) if at not in front), *(arguments[at] for at in front)]
    count = next((at for at, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    words, rest = list(arguments[:count]), list(arguments[count:])
    if not words:
        return rest
    if len(words) > 1 and others:
        words.insert(1, f"--{others}")
    return [f"--{first}", *words, *rest]


def _preset_by_size(
    filed: Mapping[str, Any], variables: Mapping[str, list[str]], typed: Mapping[str, list[str]]
) -> str | None:
    """The preset for the size of a person's own base model, where none was named and its config.json is here."""
    source, revision = (_first(path, typed, variables, filed) for path in ("base.source", "base.revision"))
    model_config = size_class.config_of(source, revision) if source else None
    return size_class.preset_for(model_config) if model_config else None


def _first(path: str, *given: Mapping[str, Any]) -> str:
    """The text of the first of these that has the setting."""
    value = next((one[path] for one in given if one.get(path)), "")
    return " ".join(value) if isinstance(value, list) else str(value)


def _without_its_base(preset: settings.Config, source: str) -> settings.Config:
    """The preset for another base model: what is about its own one (commit, digest, directory) is not used."""
    if source in ("", preset.base.source):
        return preset
    is_built = source.partition(":")[0] in ("wheel", "toy")
    usual = {path.partition(".")[2]: "" for path in flags.OF_ONE_BASE if not (is_built and path == "base.name")}
    return preset.model_copy(update={"base": preset.base.model_copy(update=usual)})


def _flags(arguments: Sequence[str], problems: list[Problem]) -> dict[str, list[str]]:
    """Setting -> the words after its flag; of two equal flags the last one counts."""
    paths = {short: path for path, short in flags.SHORTCUTS.items()} | {
        path: path for path in (PRESET, *flags.fields())
    }
    values: dict[str, list[str]] = {}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--"):
            problems.append(Problem("a value without a flag", argument, "write --section.field VALUE; see --help"))
            continue
        name, equals, value = argument[2:].partition("=")
        words = [value] if equals else []
        while not equals and waiting and not waiting[0].startswith("--"):
            words.append(waiting.pop(0))
        path = paths.get(name)
        if path is None:
            problems.append(_unknown_flag(name, paths))
        elif words or (path != PRESET and flags.is_switch(path)):
            values[path] = words or ["true"]
        else:
            problems.append(Problem(f"--{name} needs a value", fix=f"write --{name} VALUE"))
    return values


def _unknown_flag(name: str, paths: Iterable[str]) -> Problem:
    if new := flags.RENAMED.get(name):
        return Problem(f"--{name} was renamed to --{new}", fix=f"write --{new} VALUE")
    if gone := flags.REMOVED.get(name):
        return Problem("a setting that is gone", f"--{name}", gone)
    fix = did_you_mean(name, paths, "--") or flags.help_command("all")
    return Problem("unknown setting", f"--{name}", fix)


def _variables(environment: Mapping[str, str], problems: list[Problem]) -> dict[str, list[str]]:
    """Setting -> its environment variable's text, as one word."""
    paths = {flags.variable(path): path for path in (PRESET, *flags.fields())}
    gone = {flags.variable(path): fix for path, fix in flags.REMOVED.items()}
    renamed = {flags.variable(path): flags.variable(new) for path, new in flags.RENAMED.items()}
    ours = {name: value for name, value in environment.items() if name.upper().startswith(flags.ENV_PREFIX)}
    for name in ours:
        if new := renamed.get(name.upper()):
            problems.append(Problem(f"{name} was renamed to {new}", fix=f"set {new}"))
        elif name.upper() not in paths:
            fix = gone.get(name.upper()) or did_you_mean(name.upper(), paths) or flags.help_command("all")
            problems.append(Problem("unknown environment variable", name, fix))
    return {paths[name.upper()]: [value] for name, value in ours.items() if name.upper() in paths}


def _from_files(
    filed: Mapping[str, Any], filed_from: Mapping[str, str], preset: settings.Config, problems: list[Problem]
) -> dict[str, Any]:
    """Setting -> value of a file; one that only repeats the preset is nobody's wish, as in a run's config.json.

    A value means what it means behind a flag: one of a list may stand alone, and a whole number is text where text is
    expected.
    """
    given = {}
    for path, value in filed.items():
        is_list, kind = flags.is_list(path), flags.type_of(flags.fields()[path])
        kind = flags.bare(typing.get_args(kind)[0])[0] if is_list else kind
        items = value if isinstance(value, list) else [value]
        if kind in (int, float) and (bad := [one for one in items if isinstance(one, bool)]):
            what = f"{path} ({filed_from[path]}): input should be a valid number"
            problems.append(Problem(what, bad[0], flags.help_command(path)))
            continue
        if kind not in (int, float, bool):
            items = [str(one) if isinstance(one, int) and not isinstance(one, bool) else one for one in items]
        if isinstance(value, str):
            read = list(_read(path, [value], problems))
        elif isinstance(value, list) or (is_list and value is not None):
            read = [[_at_home(one, path) if isinstance(one, str) else one for one in items]]
        else:
            read = items
        for one in read:
            usual = json.loads(json.dumps(flags.value_of(preset, path), default=str))
            if one != usual:
                given[path] = one
    return given


def _read(path: str, words: list[str], problems: list[Problem]) -> Iterator[Any]:
    """The value as pydantic takes it; nothing for a problem.

    Of a list `a,b`, `a b` and `["a","b"]` mean the same; `"a, b"` in quotes is one item. `~/` is the home folder.
    """
    if not flags.is_list(path):
        yield _at_home(" ".join(words), path)
    elif len(words) == 1 and words[0].startswith("["):
        try:
            yield json.loads(words[0])
        except (ValueError, RecursionError):
            problems.append(Problem(f"--{path}: the list cannot be read", words[0], "write a,b,c, or a list in JSON"))
    else:
        # csv: a path with a comma stands in double quotes
        yield [_at_home(piece, path) for row in csv.reader(words) for piece in row if piece]


def _at_home(text: str, path: str) -> str:
    """`~/x` as the shell would have written it, had it stood alone."""
    return os.path.expanduser(text) if text.startswith("~/") and path != "inference.prompt" else text


def _validated(
    preset: settings.Config,
    given: dict[str, Any],
    sources: Mapping[str, str],
    problems: list[Problem],
    *,
    cross_checks: bool,
) -> settings.Config | None:
    """The preset with what is given. A bad value is a problem, and set aside so that the others are checked too.

    `cross_checks` is off where the preset is unknown: what does not go together depends on it.
    """
    aside: set[str] = set()
    while True:
        values = preset.model_dump() | {"overrides": {path: sources[path] for path in given}}
        for path, value in given.items():
            *sections, name = path.split(".")
            functools.reduce(dict.__getitem__, sections, values)[name] = value
        config, complaints, bad = None, [], set[str]()
        try:
            config = settings.Config.model_validate(values)
        except ValidationError as error:
            for item in error.errors():
                path = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
                bad |= _blamed(path, item["msg"], given)
                complaints += [problem for problem in _problems_of(path, item, sources) if path or cross_checks]
        if not bad:
            complaints += methods.problems(settings.ComposeSection.model_validate(values["compose"]))
        # what is said about a value that was set aside is not about what was typed
        problems += [p for p in complaints if not any(_names(path, p.what) for path in aside)]
        if not bad:
            return config
        aside |= bad
        given = {path: value for path, value in given.items() if path not in bad}


def _blamed(path: str, message: str, given: Iterable[str]) -> set[str]:
    """The given settings that an error is about: the one it stands at, or those of its section that it names."""
    if path in given:
        return {path}
    below = {one for one in given if path and one.startswith(f"{path}.")}
    return {one for one in below if _names(one.rpartition(".")[2], message)} or below


def _names(name: str, message: str) -> bool:
    return bool(re.search(rf"\b{re.escape(name)}\b", message))


def _problems_of(path: str, item: Any, sources: Mapping[str, str]) -> list[Problem]:
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":  # a validator of ours: it already names the settings, one per line
        return [Problem(f"{path}: {line}" if path else line) for line in message.splitlines()]
    source = sources.get(path, "flag")
    spelled = {"environment": flags.variable(path), "flag": f"--{path}"}.get(source, f"{path} ({source})")
    is_unquoted = item["type"] == "string_type" and source.startswith("file ")
    fix = "write it in quotes" if is_unquoted else flags.help_command(path)
    return [Problem(f"{spelled}: {message[0].lower()}{message[1:]}", item["input"], fix)]
