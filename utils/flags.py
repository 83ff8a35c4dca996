"""Settings by their path: `task.lora.rank` as a field of `Config`, as a flag, as an environment variable, as text."""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import config as settings
from utils.secrets import redact

ENV_PREFIX = "DTA_"
# path -> the short flag that means the same
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
    "inputs.composed": "composed",
    "rollout.watch": "watch",
    "runs.yes": "yes",
}


# about the preset's own base model; empty for another one until they are given
OF_ONE_BASE = ("base.revision", "base.sha256", "base.name")
# path -> what to do instead of a setting that is gone
REMOVED = {
    "evaluate.launcher": "launch the evaluation itself, which trains its controls in the same ranks: accelerate launch "
    "--config_file FILE scripts/evaluate.py"
}
# former path of a setting -> its path
RENAMED = {
    f"{stage}.train.{former}": f"{stage}.train.{name}"
    for stage in ("domain", "task")
    for former, name in settings.RENAMED.items()
}


@functools.cache
def fields() -> dict[str, FieldInfo]:
    """Every setting's path and field, in the order of config.py."""

    def below(model: type[BaseModel], prefix: str) -> dict[str, FieldInfo]:
        by_path: dict[str, FieldInfo] = {}
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                by_path |= below(kind, f"{prefix}{name}.")
            elif prefix:  # `preset` and `overrides` say where a configuration comes from
                by_path[prefix + name] = field
        return by_path

    return below(settings.Config, "")


def type_of(field: FieldInfo) -> Any:
    """The type of a field's values when it is given: without `| None`, and without bounds."""
    return bare(field.annotation)[0]


def bounds_of(field: FieldInfo) -> list[Any]:
    """What pydantic holds a field's value, or each of its values, to."""
    kind, bounds = bare(field.annotation)
    items = bare(typing.get_args(kind)[0])[1] if typing.get_origin(kind) is tuple else []
    return [*field.metadata, *bounds, *items]


def bare(kind: Any) -> tuple[Any, list[Any]]:
    """A type without `| None` and without its bounds, and those."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) is not typing.Annotated:
        return kind, []
    kind, *extra = typing.get_args(kind)
    return kind, [bound for one in extra for bound in getattr(one, "metadata", [one])]


def is_list(path: str) -> bool:
    """Whether a setting takes several values."""
    return typing.get_origin(type_of(fields()[path])) is tuple


def is_switch(path: str) -> bool:
    """Whether a setting's flag may stand alone."""
    return type_of(fields()[path]) is bool


def variable(path: str) -> str:
    """The environment variable of a setting."""
    return f"{ENV_PREFIX}{path.replace('.', '__')}".upper()


def value_of(config: settings.Config, path: str) -> Any:
    """The value of a setting."""
    return functools.reduce(getattr, path.split("."), config)


def shown(value: Any) -> str:
    """A value for people."""
    if value is None:
        return "(open)"
    if isinstance(value, (tuple, list)):
        return ",".join(str(item) for item in value) or "(none)"
    return str(value) if value != "" else "(empty)"


def arguments(config: settings.Config, sections: Sequence[str]) -> list[str]:
    """The flags that give another process these sections: every value that is not the preset's."""
    preset = settings.PRESETS[config.preset]()
    words = ["--preset", config.preset]
    for path in fields():
        value, usual = value_of(config, path), value_of(preset, path)
        if path.split(".")[0] in sections and value != usual:
            words.append(f"--{path}={_typed(value)}")
    return words


def given(config: settings.Config, *sections: str) -> str:
    """The preset, the settings of these sections and the run directories that are not the preset's, as they are typed.

    It is put behind a command that a message proposes, so that the command is about the same model, data and runs.
    Empty where all are the preset's.
    """
    preset, usual = settings.PRESETS[config.preset](), settings.Config.model_fields["preset"].default
    words = [] if config.preset == usual else ["--preset", config.preset]
    is_other = config.base.source != preset.base.source
    for path in fields():
        value = value_of(config, path)
        if is_other and path in OF_ONE_BASE and not value:
            continue
        named = path.split(".")[0] in sections or path in ("run.data_dir", "run.models_dir")
        if named and value != value_of(preset, path):
            words += [f"--{path}", _typed(value)]
    return redact("".join(f" {shlex.quote(word)}" for word in words))


def _typed(value: Any) -> str:
    """A value as it is typed behind its flag: a list with commas, an item that has one in quotes."""
    if not isinstance(value, tuple) or not value:
        return json.dumps(value) if isinstance(value, tuple) else str(value)
    return ",".join(f'"{item}"' if "," in str(item) else str(item) for item in value)


def to_use(base: Mapping[str, Any], source: str, revision: str = "") -> str:
    """How a run of another base model than `source` at `revision` is used, by that model's record.

    Empty where neither differs. A branch or a tag is no revision here, so that its commit has to be looked up.
    """
    is_same, theirs = base["source"] == source, base.get("revision") or ""
    if is_same and theirs in ("", revision):
        return ""
    names = {"source": "" if is_same else base["source"], "revision": theirs, "quantization": base.get("quantization")}
    look_up = ""
    if theirs and not settings.COMMIT.fullmatch(theirs):
        names["revision"] = "COMMIT"
        url = f"https://huggingface.co/{base['source']}"
        look_up = f", which this prints: git ls-remote {shlex.quote(url)} {shlex.quote(theirs)}"
    words = [f" --base.{name} {shlex.quote(value)}" for name, value in names.items() if value and value != "none"]
    return f"; to use it, repeat your command with{redact(''.join(words) + look_up)}"


def command(words: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> str:
    """This process as a person would type it again, environment variables of ours first; without secrets."""
    typed, around = sys.argv if words is None else words, os.environ if environment is None else environment
    given = [f"{name}={shlex.quote(around[name])}" for name in sorted(around) if name.upper().startswith(ENV_PREFIX)]
    return redact(" ".join([*given, "python", shlex.join(typed)]))


def help_command(topic: str) -> str:
    """How to read about a setting: the command of the script that runs, or its flag where no script does."""
    script = Path(sys.argv[0])
    of = f": python {shlex.quote(sys.argv[0])}" if script.parent.name == "scripts" else ""
    return f"see{of} --help {topic}"
