"""Every observation on disk, flushed, before it is acted on: one JSON line each. Replayed, it gives the same state.

The first line says what is rolled out and by which policy. A line that a crash cut short can only be the last one and
is left out; any other unreadable line is an error, because a state made of half the evidence would be a lie.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.exceptions import MALFORMED, ArtefactError, ConfigError, DataError, Problem
from utils.rollout.controller import Observation, State, begin, replay
from utils.rollout.policy import Policy

# seconds since the epoch: no clock gives more, and no calendar takes much more
LATEST = 1e11
HEADER = ("id", "started_at", "policy", "production", "candidate")


@dataclass(frozen=True)
class Story:
    """A journal that was read."""

    header: dict[str, Any]
    policy: Policy
    observations: list[Observation]
    events: list[dict[str, Any]] = field(default_factory=list)
    snapshot: tuple[int, dict[str, Any]] | None = None
    """How many observations a state that was written down rests on, and that state."""

    @property
    def began(self) -> State:
        return begin(self.header["started_at"])

    @cached_property
    def state(self) -> State:
        """From the last snapshot on: a day has 86,400 observations."""
        if self.snapshot is None:
            return self.replayed
        seen, state = self.snapshot
        return replay(State.from_json(state), self.observations[seen:], self.policy)

    @property
    def replayed(self) -> State:
        """From the first observation on; equal to `state`, or the journal was tampered with."""
        return replay(self.began, self.observations, self.policy)

    @property
    def is_finished(self) -> bool:
        """Over, and a promotion was carried out or given up."""
        done = self.state.phase != "promoted" or self.happened("published") or self.happened("abandoned")
        return self.state.is_over and done

    def happened(self, event: str) -> bool:
        return any(entry["event"] == event for entry in self.events)


class Journal:
    """Appends lines. `append` raises OSError; who must act all the same (a rollback) catches it."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists():
            _cut_half_line(path)

    def append(self, kind: str, value: Any) -> None:
        """One line, on the disk when this returns."""
        line = json.dumps({kind: value}, ensure_ascii=False, separators=(",", ":")) + "\n"
        with self.path.open("ab") as handle:
            start = handle.tell()
            try:
                handle.write(line.encode())
                handle.flush()
                os.fsync(handle.fileno())
            except OSError:
                os.ftruncate(handle.fileno(), start)
                raise

    def event(self, event: str, at: float, **facts: Any) -> None:
        """Something that was done at the edge, not part of the state."""
        self.append("event", {"event": event, "at": at, **facts})


def read(path: Path) -> Story:
    """Raises ArtefactError when there is no journal, or a line in its middle cannot be read."""
    try:
        lines = files.regular_bytes(path).split(b"\n")
    except OSError as error:
        raise ArtefactError(Problem(f"there is no journal: {error.strerror}", str(path))) from error
    values: dict[str, list[Any]] = {"header": [], "seen": [], "event": [], "state": []}
    snapshot = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            ((kind, value),) = json.loads(line).items()
            values[kind].append(value)
            if kind == "state":
                snapshot = (len(values["seen"]), value)
        except MALFORMED as error:
            if number == len(lines):  # what follows the last newline
                break
            fix = "abort this rollout and start another"
            raise ArtefactError(Problem(f"{path}:{number} cannot be read", line[:80], fix)) from error
    if len(values["header"]) != 1:
        raise ArtefactError(Problem("the journal has no header", str(path), "abort this rollout and start another"))
    header = values["header"][0]
    try:
        if missing := [key for key in HEADER if key not in header]:
            raise KeyError(*missing)
        _check_header(header)
        seen = [Observation.from_json(value) for value in values["seen"]]
        _check_times(header["started_at"], *(one.at for one in seen))
        events = [{**value, "event": str(value["event"])} for value in values["event"]]
        story = Story(header, Policy.from_json(header["policy"]), seen, events, snapshot)
        _ = story.state  # replayed here, where what cannot be is still an error of the file
    except (*MALFORMED, DataError, ConfigError) as error:
        what = f"{path} holds what no controller wrote: {type(error).__name__}: {error}"
        raise ArtefactError(Problem(what, fix="abort this rollout and start another")) from error
    return story


def _check_header(header: dict[str, Any]) -> None:
    """Raises ValueError for what a report could not be written from."""
    sides = [header[which] for which in ("production", "candidate")]
    texts = [header["id"], *(side.get(key) for side in sides for key in ("address", "digest"))]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its header does not say what is rolled out")


def _check_times(*times: Any) -> None:
    if not all(type(at) in (int, float) and 0 <= at < LATEST for at in times):
        raise ValueError("a time that is none")


def _cut_half_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(path, whole)
