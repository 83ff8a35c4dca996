"""Experiment trackers through accelerate, told which run this is: its name, its settings, a folder of its own.

accelerate drops a tracker that is not installed with a line of log, and gives none of them a name; what cannot work is
refused here before a model is loaded.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.artifacts import files
from utils.exceptions import ConfigError, Problem

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "tracking"
# the packages of those that are not called like their tracker
_PACKAGES = {"comet_ml": "comet-ml"}
_WANDB_HOST = "api.wandb.ai"
_WITHOUT_KEY = ("offline", "disabled", "dryrun")


def check(names: Sequence[str]) -> None:
    """Raises ConfigError, all problems at once, for a tracker that is unknown, not installed or has no login."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = {str(name) for name in get_available_trackers()}
    problems = []
    for name in names:
        if name == "all":
            continue
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            problems.append(Problem("run.trackers: no such tracker", name, f"one of {known}, or none"))
        elif name not in there:
            what = f"run.trackers: {name} is not installed"
            problems.append(Problem(what, fix=f"pip install {_PACKAGES.get(name, name)}, or --run.trackers none"))
        elif name == "wandb" and not _wandb_has_a_key():
            fix = "wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline"
            problems.append(Problem("run.trackers: wandb has no key", fix=fix))
    if problems:
        raise ConfigError(problems)


def start(accelerator: Accelerator, project: str, settings: dict[str, Any], directory: Path) -> None:
    """Start the accelerator's trackers for a run in `directory`. Raises ConfigError when one of them cannot."""
    if not accelerator.log_with:
        return
    try:
        accelerator.init_trackers(project, flat(settings), _options(directory))
    except Exception as error:  # each of a dozen libraries raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"run.trackers: a tracker cannot start: {reason}"
        raise ConfigError(Problem(what, fix="fix what it names, or --run.trackers none")) from error


def flat(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; a list is its text, since TensorBoard takes single values."""
    settings_by_name: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            settings_by_name |= flat(value, f"{before}{key}.")
        else:
            settings_by_name[before + key] = value if isinstance(value, str | int | float | bool) else str(value)
    return settings_by_name


def _options(directory: Path) -> dict[str, dict[str, Any]]:
    name, folder = directory.name, directory / FOLDER
    files.make_directory(folder)
    return {
        "wandb": {"name": name, "dir": str(folder)},
        "trackio": {"name": name},
        "swanlab": {"experiment_name": name, "logdir": str(folder)},
        "mlflow": {"run_name": name},
        "clearml": {"task_name": name},
    }


def _wandb_has_a_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in _WITHOUT_KEY:
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
