"""Charts as inline SVG that fill whatever width they get: text keeps its size, colours follow the page.

Coordinates are percent of the plot, so nothing has to know how wide it will be; only curves, which SVG takes in no
percent, lie in a nested picture that is stretched. Labels stand outside the plot, in the padding that the style gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from utils.html.numbers import general

HEIGHT = 210
PADDING = 0.05
MOST_POINTS = 150


@dataclass(frozen=True)
class AxisScale:
    """From a value to percent of the plot."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float]) -> AxisScale:
        """A little more than the values. Raises ValueError when there are none."""
        found = list(values)
        low, high = min(found), max(found)
        room = PADDING * (high - low) or 0.5 * abs(low) or 1.0
        return cls(low - room, high + room)

    def at(self, value: float) -> float:
        """0 to 100; what lies outside is put on the edge."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 3)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, most: int = 5) -> list[float]:
        from matplotlib.ticker import MaxNLocator

        located = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        return [float(f"{value:.10g}") for value in located if self.holds(value)]


@dataclass(frozen=True)
class Series:
    """Points of one colour (`style`: domain, task, composed, other), joined by a line, marked, or both."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    line: str = "solid"
    """solid, dashed, or empty for none."""
    mark: str = ""
    """dot, ring, star, or empty for none."""
    hover: Sequence[str] = field(default=())
    """A text for each point; empty: its coordinates."""
    key: str | None = None
    """What the legend says; None: the name, empty: nothing."""


def chart(title: str, series: Sequence[Series], *, x: str, y: str, zero: bool = False) -> Markup:
    """A figure with axes, legend and hover texts; `zero` draws the line where y is 0. Empty series are left out."""
    shown = [one for one in series if one.points]
    across = AxisScale.over(point[0] for one in shown for point in one.points)
    up = AxisScale.over([*(point[1] for one in shown for point in one.points), *([0.0] if zero else [])])
    pieces = [*_axes(across, up, x, y)]
    if zero:
        height = 100 - up.at(0.0)
        pieces.append(Markup('<line class="axis" x1="0%" x2="100%" y1="{0}%" y2="{0}%"/>').format(height))
    pieces += [_curve(one, across, up) for one in shown if one.line and len(one.points) > 1]
    pieces += [mark for one in shown if one.mark for mark in _marks(one, across, up)]
    said = Markup("").join(_said(one) for one in shown)
    return Markup(
        '<figure class="chart"><figcaption>{0}</figcaption><ul class="legend">{1}</ul><div class="plot">'
        '<svg role="img" height="{2}" aria-label="{0}: {4}">{3}</svg></div></figure>'
    ).format(title, Markup("").join(_key(one) for one in shown if one.key != ""), HEIGHT, Markup("").join(pieces), said)


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of equally many neighbours."""
    width = -(-len(points) // most)
    groups = [points[at : at + width] for at in range(0, len(points), width or 1)]
    return [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]


def _axes(across: AxisScale, up: AxisScale, x: str, y: str) -> Iterable[Markup]:
    for value in up.ticks():
        height = 100 - up.at(value)
        yield Markup('<line class="grid" x1="0%" x2="100%" y1="{0}%" y2="{0}%"/>').format(height)
        yield Markup('<text x="0%" y="{}%" dx="-8" dy="4" text-anchor="end">{}</text>').format(height, general(value))
    for value in across.ticks():
        place = across.at(value)
        yield Markup('<line class="axis" x1="{0}%" x2="{0}%" y1="100%" y2="97.5%"/>').format(place)
        yield Markup('<text x="{}%" y="100%" dy="16" text-anchor="middle">{}</text>').format(place, general(value))
    yield Markup('<line class="axis" x1="0%" x2="100%" y1="100%" y2="100%"/>')
    yield Markup('<text x="100%" y="100%" dy="32" text-anchor="end">{}</text>').format(x)
    yield Markup('<text x="0%" y="0%" dx="-44" dy="-10">{}</text>').format(y)


def _curve(one: Series, across: AxisScale, up: AxisScale) -> Markup:
    points = " ".join(f"{across.at(px)},{100 - up.at(py):.3f}" for px, py in one.points)
    look = f"curve s-{one.style}" + (" dashed" if one.line == "dashed" else "")
    return Markup(
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%" class="s-{}">'
        '<polyline class="{}" points="{}"/></svg>'
    ).format(one.style, look, points)


def _marks(one: Series, across: AxisScale, up: AxisScale) -> Iterable[Markup]:
    texts = one.hover or [f"{one.name}: {general(py)} at {general(px)}" for px, py in one.points]
    for (px, py), text in zip(one.points, texts, strict=True):
        yield mark(one.mark, one.style, f"{across.at(px)}%", f"{100 - up.at(py):.3f}%", text)


def mark(kind: str, style: str, left: str, top: str, hover: str) -> Markup:
    """A point with its hover text."""
    if kind == "star":
        inside = Markup('<text class="star" x="{}" y="{}" dy="8" text-anchor="middle">★</text>').format(left, top)
    else:
        radius = 4.5 if kind == "ring" else 3.5
        inside = Markup('<circle class="{}" cx="{}" cy="{}" r="{}"/>').format(kind, left, top, radius)
    return Markup('<g class="s-{}"><title>{}</title>{}</g>').format(style, hover, inside)


def _key(one: Series) -> Markup:
    """What a series looks like, and its name."""
    line = Markup('<line class="curve{}" x1="0" x2="22" y1="5" y2="5"/>').format(" dashed" * (one.line == "dashed"))
    point = mark(one.mark, one.style, "11", "5", one.name) if one.mark and one.mark != "star" else Markup("")
    star = Markup('<text class="star s-{}" x="11" y="5" dy="6" text-anchor="middle">★</text>').format(one.style)
    drawn = Markup("").join([line if one.line else "", star if one.mark == "star" else point])
    return Markup('<li><svg class="s-{}" aria-hidden="true" viewBox="0 0 22 10">{}</svg>{}</li>').format(
        one.style, drawn, one.name if one.key is None else one.key
    )


def _said(one: Series) -> str:
    """A series in words, for who does not see it."""
    (_, first), (_, last) = one.points[0], one.points[-1]
    ys = [py for _, py in one.points]
    return (
        f"{one.name}, {len(ys)} points, from {general(first)} to {general(last)}, "
        f"lowest {general(min(ys))}, highest {general(max(ys))}. "
    )
