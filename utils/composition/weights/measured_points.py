"""Points of a weight search as the model measures them, kept on disk so that an interrupted search goes on."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from utils.artifacts import resumable
from utils.composition.weights.points import Point
from utils.logger import event, warning
from utils.progress import Whole

# the items of dev that are scored first, and the others
PART, REST, REST_DOCUMENTS = "a part", "the rest", "the documents of the rest"


class Probe(Protocol):
    """Adapters on a model with dev data; `data.has(items)` says whether there are such items."""

    data: Any

    def point(self, method: str, weights: tuple[float, ...], items: str) -> Point:
        """Losses of these items at these weights."""


class MeasuredPoints:
    """Points as the probe measures them, part by part, each a line of `remembered`; none is measured again."""

    def __init__(self, probe: Probe, remembered: Path):
        self.probe, self.remembered, self.of = probe, remembered, resumable.owner(remembered.parent)
        self.known = _points(remembered, self.of)
        self._requested: set[tuple[str, str, tuple[float, ...]]] = set()
        if self.known:
            event("the weight search goes on", measured=len(self.known))

    def on_part(self, method: str, weights: tuple[float, ...]) -> Point:
        """Losses of the items that are scored first."""
        return self._measured(PART, method, weights)

    def on_all(self, method: str, weights: tuple[float, ...]) -> Point:
        """Losses of all items."""
        return self._with(REST, method, weights)

    def on_documents(self, method: str, weights: tuple[float, ...]) -> Point:
        """Losses of all documents, and of the part's questions."""
        return self._with(REST_DOCUMENTS, method, weights)

    def _with(self, rest: str, method: str, weights: tuple[float, ...]) -> Point:
        part = self.on_part(method, weights)
        return part.and_rest(self._measured(rest, method, weights)) if self.probe.data.has(rest) else part

    def _measured(self, items: str, method: str, weights: tuple[float, ...]) -> Point:
        key = (items, method, weights)
        if key not in self.known:
            point = self.known[key] = self.probe.point(method, weights, items)
            resumable.append(self.remembered, {"items": items} | asdict(point), self.of)
            shown, answer = ", ".join(f"{w:g}" for w in weights[:6]), point.answer_nll if point.answer_nlls else None
            losses = {"answer_loss": answer, "domain_loss": point.domain_nll, "number": len(self.known)}
            event(f"{method} ({shown}) on {items} of dev", **losses)
        if key not in self._requested:
            self._requested.add(key)
            if Whole.running is not None:
                Whole.running.step(method)
        return self.known[key]


def _points(path: Path, of: str) -> dict[tuple[str, str, tuple[float, ...]], Point]:
    """Points that were measured before; what was changed since, or an older version wrote, is measured again."""
    points = {}
    for values, is_as_written in resumable.lines(path, of):
        with suppress(TypeError, KeyError):
            if not is_as_written:
                warning("a point of the weight search is measured again: its line was changed", path=path)
                continue
            items = values.pop("items")
            point = Point(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
            points[items, point.method, point.weights] = point
    return points
