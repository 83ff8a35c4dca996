"""From a command line to a checked `Config`, and from an exception to a message and an exit code.

The flags are derived from the types in `config.py` by pydantic-settings; there is no second parser. Precedence:
flag, then environment variable (`DTA_TASK__LORA__RANK`), then preset. All problems are reported together, in the
spelling that was typed, with "did you mean". A script needs two lines:

    if __name__ == "__main__":
        cli.run(main, plan, sections=("base", "data", "run"), description=__doc__)
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError, create_model
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

import config as settings
from utils import logger, secrets, signals
from utils.exceptions import (
    ArtefactError,
    ConfigError,
    Interrupted,
    OutOfMemory,
    PipelineError,
    Problem,
    is_lost_process,
    is_out_of_memory,
)

ENV_PREFIX = "DTA_"
SHORTCUTS = {
    "inference.prompt": "prompt",
    "inference.prompts_file": "prompts_file",
    "inference.output_file": "output_file",
    "inference.adapters": "adapters",
    "merge.path": "merge_path",
    "compose.weights": "weights",
    "hub.push_to_hub": "push_to_hub",
    "hub.hub_model_id": "hub_model_id",
    "hub.hub_private_repo": "hub_private_repo",
    "hub.hub_revision": "hub_revision",
    "inputs.domain_adapter": "domain_adapter",
    "inputs.task_adapter": "task_adapter",
    "rollout.watch": "watch",
}
USAGE = """\
  --preset NAME            start from this preset: {presets} (default smollm2_135m)
  --dry-run                print the resolved settings, where each came from and what would be done; do nothing
  --help                   this text
  --SECTION.FIELD VALUE    any setting below; lists are written a,b,c
Environment: DTA_SECTION__FIELD=VALUE, for example DTA_TASK__LORA__RANK=32; flags win."""


def run(
    main: Callable[[settings.Config], dict[str, Any]],
    plan: Callable[[settings.Config], list[str]],
    *,
    sections: Sequence[str],
    description: str | None,
    argv: Sequence[str] | None = None,
    status: Callable[[dict[str, Any]], int] = lambda result: 0,
) -> NoReturn:
    """Parse, check, run `main`, print its result as one line of JSON and exit; errors become text and an exit code.

    `status` gives the exit code of a result.
    """
    with logger.clean_output():
        logger.setup()
        _prepare_process()
        arguments = list(sys.argv[1:] if argv is None else argv)
        sys.exit(_exit_code(main, plan, sections, description or "", arguments, status))


def _exit_code(
    main: Callable[[settings.Config], dict[str, Any]],
    plan: Callable[[settings.Config], list[str]],
    sections: Sequence[str],
    description: str,
    arguments: list[str],
    status: Callable[[dict[str, Any]], int],
) -> int:
    try:
        if {"--help", "-h"} & set(arguments):
            print(_help_text(description, sections))
            return 0
        dry_run = "--dry-run" in arguments
        config = resolve([a for a in arguments if a != "--dry-run"], os.environ)
        if dry_run:
            print(_card(config, sections, plan(config)))
            result: dict[str, Any] = {"dry_run": True, "config": config.model_dump(mode="json")}
        else:
            with signals.terminable():
                result = main(config)
        if logger.rank() == 0:
            print(logger.json_line(result), flush=True)
    except PipelineError as error:
        if logger.rank() == 0 or isinstance(error, OutOfMemory):  # memory may be short on one process only
            print(logger.printable(str(error)), file=sys.stderr)
        return error.exit_code
    except signals.Terminated:
        print("stopped by SIGTERM; nothing is half-written, run the same command again", file=sys.stderr)
        return Interrupted.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - shown here, because the interpreter would show it with secrets in it
        explained = _explained(error)
        print(logger.printable(str(explained) if explained else traceback.format_exc()), file=sys.stderr)
        return explained.exit_code if explained else 1
    return 0 if dry_run else status(result)


def _explained(error: Exception) -> PipelineError | None:
    """What no stage foresaw about memory, a file or another process: still a message and not a traceback."""
    said = (str(error).splitlines() or [""])[0] or type(error).__name__
    if is_out_of_memory(error):
        problem = Problem(f"{said}; what was complete before is as it was", fix="use a machine with more memory")
        return OutOfMemory(problem)
    if is_lost_process(error):
        what = f"another process of this run ended or cannot be reached: {said}"
        return Interrupted(Problem(what, f"process {logger.rank()}", "see what it said; run the same command again"))
    if isinstance(error, OSError):
        return ArtefactError(Problem(f"cannot use {error.filename or 'a file'}: {error.strerror or error}"))
    return None


def _prepare_process() -> None:
    """Process-wide defaults that must be set before torch is imported; each can be overridden from outside."""
    # GNU OpenMP's threads spin while they wait: with other work on the cores a training step took 8x longer so
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if logger.rank() > 0 or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def resolve(arguments: Sequence[str], environment: Mapping[str, str]) -> settings.Config:
    """The configuration asked for by flags and environment variables. Raises ConfigError with every problem."""
    given = [*arguments, *(value for name, value in environment.items() if name.upper().startswith(ENV_PREFIX))]
    if unreadable := [text for text in given if not _is_text(text)]:
        fix = "rename the file, or write the setting in UTF-8"
        raise ConfigError([Problem("a setting is no UTF-8 text", text, fix) for text in unreadable])
    preset_name, arguments, problems = _preset(list(arguments), environment)
    known = _paths()
    normal, flag_problems = _flags(arguments, known)
    problems += flag_problems + _unknown_variables(environment, known)
    preset = settings.PRESETS[preset_name]()
    if problems:
        raise ConfigError(problems)
    from_environment = _parsed(_variables(environment, known))
    from_flags = _parsed(normal)
    overrides = {p: "environment" for p in _leaves(from_environment)} | {p: "flag" for p in _leaves(from_flags)}
    values = _merge(_merge(preset.model_dump(), from_environment), from_flags)
    try:
        config = settings.Config.model_validate(values | {"preset": preset_name, "overrides": overrides})
    except ValidationError as error:
        raise ConfigError(_validation_problems(error, overrides)) from error
    if problems := _secret_problems(config):
        raise ConfigError(problems)
    return config


def arguments(config: settings.Config, sections: Sequence[str]) -> list[str]:
    """The flags that give another process these sections: every value that is not the preset's."""
    preset = settings.PRESETS[config.preset]()
    found = ["--preset", config.preset]
    for path, _ in _fields(settings.Config):
        if path.split(".")[0] in sections:
            value, usual = (functools.reduce(getattr, path.split("."), one) for one in (config, preset))
            if value != usual:
                text = json.dumps(value) if isinstance(value, tuple) else str(value)
                found.append(f"--{path}={text}")
    return found


def _preset(arguments: list[str], environment: Mapping[str, str]) -> tuple[str, list[str], list[Problem]]:
    name = environment.get(f"{ENV_PREFIX}PRESET", "smollm2_135m")
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        flag, equals, value = arguments[position].partition("=")
        if flag == "--preset":
            if not equals:
                position += 1
                value = arguments[position] if position < len(arguments) else ""
            name = value
        else:
            rest.append(arguments[position])
        position += 1
    if name in settings.PRESETS:
        return name, rest, []
    fix = _did_you_mean(name, settings.PRESETS) or f"presets: {', '.join(settings.PRESETS)}"
    return "smollm2_135m", rest, [Problem("--preset: no such preset", name, fix)]


def _flags(arguments: list[str], known: set[str]) -> tuple[list[str], list[Problem]]:
    """Arguments in the long spelling that pydantic-settings reads, and a problem for each unknown or lone one."""
    long_names = {short: path for path, short in SHORTCUTS.items()}
    normal: list[str] = []
    problems: list[Problem] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            problems.append(Problem("a value without a flag", argument, "write --section.field VALUE; see --help"))
            continue
        name, equals, value = argument[2:].partition("=")
        path = long_names.get(name, name)
        if not equals:
            values = []
            while position < len(arguments) and not arguments[position].startswith("--"):
                values.append(arguments[position])
                position += 1
            if not values and _is_switch(path):
                values = ["true"]
            elif not values and path in known:
                problems.append(Problem(f"--{name} needs a value", fix=f"write --{name} VALUE"))
                continue
        else:
            values = [value]
        if path not in known:
            fix = _did_you_mean(name, [*known, *long_names], "--") or "see --help for every setting"
            problems.append(Problem("unknown setting", f"--{name}", fix))
            continue
        normal.append(_spelled_out(path, values))
    return normal, problems


def _variables(environment: Mapping[str, str], known: set[str]) -> list[str]:
    by_name = {f"{ENV_PREFIX}{path.replace('.', '__')}".upper(): path for path in known}
    set_ones = [(by_name[name.upper()], value) for name, value in environment.items() if name.upper() in by_name]
    return [_spelled_out(path, [value]) for path, value in set_ones]


def _spelled_out(path: str, values: list[str]) -> str:
    """One argument `--path=value`; lists become JSON, so that `a,b`, `a b` and `["a","b"]` all mean the same."""
    if not _is_list(path):
        return f"--{path}={' '.join(values)}"
    if len(values) == 1 and values[0].startswith("["):
        return f"--{path}={values[0]}"
    return f"--{path}={json.dumps([piece for value in values for piece in value.split(',') if piece])}"


def _parsed(arguments: list[str]) -> dict[str, Any]:
    """Nested values of `--path=value` arguments, not yet validated."""
    try:
        # no text stands for None here, or the prompt `null` would be no prompt
        source = CliSettingsSource(
            _command_line(), cli_parse_args=arguments, cli_exit_on_error=False, cli_parse_none_str="\0"
        )
        return {key: value for key, value in source().items() if value is not None}
    except SettingsError as error:
        if len(arguments) == 1:
            flag, _, value = arguments[0].partition("=")
            raise ConfigError(Problem(f"{flag}: the value cannot be read", value, "see --help")) from error
        for argument in arguments:  # the library names the section only: one at a time, the culprit names itself
            _parsed([argument])
        raise ConfigError(Problem(str(error).splitlines()[-1], fix="see --help")) from error


def _unknown_variables(environment: Mapping[str, str], known: set[str]) -> list[Problem]:
    names = {f"{ENV_PREFIX}{path.replace('.', '__')}".upper() for path in known} | {f"{ENV_PREFIX}PRESET"}
    unknown = [name for name in environment if name.upper().startswith(ENV_PREFIX) and name.upper() not in names]
    return [
        Problem("unknown environment variable", n, _did_you_mean(n.upper(), names) or "see --help") for n in unknown
    ]


def _did_you_mean(name: str, candidates: Any, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(candidates), n=2, cutoff=0.6)
    if not close:  # a right field in the wrong section is the commonest slip, and far in edit distance
        close = [c for c in sorted(candidates) if c.rpartition(".")[2] == name.rpartition(".")[2]][:3]
    return "did you mean " + " or ".join(f"{prefix}{c}" for c in close) + "?" if close else ""


def _validation_problems(error: ValidationError, overrides: Mapping[str, str]) -> list[Problem]:
    problems = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error":  # a validator of ours: it already names the settings, one per line
            problems += [Problem(f"{path}: {line}" if path else line) for line in message.splitlines()]
            continue
        source = overrides.get(path)
        spelled = f"{ENV_PREFIX}{path.replace('.', '__').upper()}" if source == "environment" else f"--{path}"
        problems.append(Problem(f"{spelled}: {message[0].lower()}{message[1:]}", item["input"], "see --help"))
    return problems


def _secret_problems(config: settings.Config) -> list[Problem]:
    """Settings are written into manifests: none may hold a secret. A prompt is not written, and may say anything."""
    what = "holds what looks like a password or an access token, and settings are written into manifests"
    fix = "give it in the environment (HF_TOKEN, WANDB_API_KEY, ...), and leave it out here"
    return [
        Problem(f"--{path} {what}", fix=fix)
        for path, _ in _fields(settings.Config)
        if path != "inference.prompt" and secrets.holds_secret(_spelled(_value(config, path)))
    ]


def _is_text(argument: str) -> bool:
    """Bytes of the command line that are no UTF-8 become halves of surrogate pairs, which no file can hold."""
    return "\0" not in argument and not any("\ud800" <= c <= "\udfff" for c in argument)


def _command_line() -> type[BaseSettings]:
    """`Config` without its defaults, as the settings class that the flag and environment sources read."""

    def optional(model: type[BaseModel], base: type[BaseModel], skip: tuple[str, ...] = ()) -> type[Any]:
        fields: dict[str, Any] = {}
        for name, field in model.model_fields.items():
            if name not in skip:
                kind = field.annotation
                nested = isinstance(kind, type) and issubclass(kind, BaseModel)
                fields[name] = (optional(kind, BaseModel) if nested else kind, None)
        return create_model(model.__name__, __base__=base, **fields)

    class Base(BaseSettings):
        model_config = SettingsConfigDict(extra="forbid")

    return optional(settings.Config, Base, skip=("preset", "overrides"))


def _paths(model: type[BaseModel] = settings.Config, prefix: str = "") -> set[str]:
    return {path for path, _ in _fields(model, prefix)}


def _fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += _fields(kind, f"{prefix}{name}.")
        elif prefix:
            found.append((prefix + name, field))
    return found


def _is_list(path: str) -> bool:
    kinds = dict(_fields(settings.Config))
    return path in kinds and str(kinds[path].annotation).startswith("tuple")


def _is_switch(path: str) -> bool:
    field = dict(_fields(settings.Config)).get(path)
    return field is not None and field.annotation is bool


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return found


def _merge(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        merged[key] = _merge(merged[key], value) if isinstance(value, Mapping) and key in merged else value
    return merged


def _help_text(description: str, sections: Sequence[str]) -> str:
    lines = [description.strip(), "", USAGE.format(presets=", ".join(settings.PRESETS)), ""]
    defaults = settings.smollm2_135m().model_dump(mode="json")
    for section in sections:
        lines.append(f"{section}:")
        for path, field in _fields(settings.Config.model_fields[section].annotation, f"{section}."):
            value: Any = defaults
            for part in path.split("."):
                value = value[part]
            short = f" (or --{SHORTCUTS[path]})" if path in SHORTCUTS else ""
            lines.append(f"  --{path}{short}\n        {field.description or ''} Default: {_spelled(value)}.")
    others = [name for name in settings.Config.model_fields if name not in (*sections, "preset", "overrides")]
    lines.append(f"\nThe sections {', '.join(others)} are accepted too, so one set of flags serves every script.")
    return "\n".join(lines)


def _card(config: settings.Config, sections: Sequence[str], plan: list[str]) -> str:
    lines = [f"preset {config.preset}"]
    for path, _ in _fields(settings.Config):
        if path.split(".")[0] in sections:
            value = _spelled(_value(config, path))
            lines.append(f"  {path:<40} {value:<44} {config.overrides.get(path, 'preset')}")
    return "\n".join([*lines, "", "would do:", *(f"  - {step}" for step in plan)])


def _value(config: settings.Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _spelled(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(str(item) for item in value) or "(none)"
    return str(value) if value != "" else "(empty)"
