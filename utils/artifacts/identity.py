"""What a run is: an explicit list of what decides its result, and how a run that somebody has is known again.

An identity is written under recorded names: a setting may be renamed without orphaning a run, and a setting that
decides nothing (trackers, threads, how many checkpoints are kept, what is only shown) is not in it. What trades memory
for time (micro-batch, gradient checkpointing, attention) is recorded in the manifest's `settings` and is not in it
either, so a run can go on with others. `METHOD` says what no setting says: which version of our own doing made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from config import with_today_s_names
from utils.artifacts import files

# raised when the same settings give another result than before: runs that were made the old way are then made anew
METHOD = {"prepared": 1, "domain": 1, "task": 1, "composed": 1, "merged": 1, "evaluation": 1, "benchmark": 1}
# manifests of before 2026-11-30 hold dumps of whole settings sections instead
MARK = "method"


def _as_recorded(recorded: Mapping[str, Any]) -> dict[str, Any]:
    return dict(recorded)


@dataclass(frozen=True)
class Identity:
    """What decides a result. `values` are JSON values; `earlier` makes today's values of what earlier versions wrote.

    `earlier` may add what the earlier version did otherwise, so that such a run is another one.
    """

    values: dict[str, Any]
    earlier: Callable[[Mapping[str, Any]], dict[str, Any]] = _as_recorded

    @classmethod
    def of(
        cls,
        stage: str,
        values: Mapping[str, Any],
        earlier: Callable[[Mapping[str, Any]], dict[str, Any]] = _as_recorded,
    ) -> Identity:
        """The identity of a run of this stage, by today's method. Raises KeyError for an unknown stage."""
        return cls({"stage": stage, MARK: METHOD[stage], **values}, earlier)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the values."""
        return files.fingerprint(self.values)

    def is_of(self, recorded: Any) -> bool:
        """Whether a recorded identity, of this or an earlier version, is this one."""
        return not self.differences(recorded)

    def differences(self, recorded: Any) -> list[str]:
        """What differs in a recorded identity, as sentences; empty when it is this one."""
        if not isinstance(recorded, dict):
            return ["it is not known what it was made with"]
        try:
            first = {"stage": self.values["stage"], MARK: 1}
            values = recorded if MARK in recorded else first | self.earlier(recorded)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            return ["it was made by another version"]
        return sorted(_differences(values, self.values))


def settings_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings a run was made with, also those that decide nothing, under today's names.

    Earlier manifests have them in `identity`.
    """
    recorded = dict(manifest.get("settings") or manifest["identity"])
    if isinstance(recorded.get("train"), Mapping):
        recorded["train"] = with_today_s_names(recorded["train"])
    return recorded


def chosen(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Recorded name -> value of the setting that it stands for; a setting that is not there is left out."""
    return {recorded: values[setting] for recorded, setting in names.items() if setting in values}


def same_names(*names: str) -> dict[str, str]:
    """Recorded names that are still the settings' own."""
    return {name: name for name in names}


def _differences(recorded: Any, current: Any, path: str = "") -> Iterator[str]:
    if isinstance(recorded, dict) and isinstance(current, dict):
        for key in sorted({*recorded, *current}, key=str):
            yield from _differences(recorded.get(key), current.get(key), f"{path}.{key}".lstrip("."))
    elif files.canonical_json(recorded) != files.canonical_json(current):
        yield f"{path} was {recorded!r}, now {current!r}"
