"""Charts as inline SVG that fill whatever width they get: text keeps its size, colours follow the page.

`chart` draws lines and points, `bars` draws bars from 0. Everything that is drawn here has the style sheet's colours.
Coordinates are percent of the plot, so nothing has to know how wide it will be; only curves, which SVG takes in no
percent, lie in a nested picture that is stretched. Labels stand outside the plot, in the padding that the style gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from utils.html.numbers import general

HEIGHT = 210
PADDING = 0.05
MOST_POINTS = 150
# heights of a bar chart's rows, in pixels: a group's name, and a bar below its own
GROUP_HEIGHT, BAR_HEIGHT, BAR_THICKNESS = 24, 34, 10
ROUND_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class AxisScale:
    """From a value to percent of the plot."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float]) -> AxisScale:
        """A little more than the values. Raises ValueError when there are none."""
        numbers = list(values)
        low, high = min(numbers), max(numbers)
        room = PADDING * (high - low) or 0.5 * abs(low) or 1.0
        return cls(low - room, high + room)

    def at(self, value: float) -> float:
        """0 to 100; what lies outside is put on the edge."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 3)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, most: int = 5, *, whole: bool = False) -> list[float]:
        """Multiples of a round step inside the scale, at most `most` steps from first to last; `whole`: integers."""
        rough = max((self.high - self.low) / most, 1.0 if whole else 0.0)
        power = 10.0 ** math.floor(math.log10(rough))
        # a rough step that is round but for its last bit is round
        steps = [power * factor for factor in ROUND_STEPS if not (whole and power * factor % 1)]
        step = next(step for step in steps if step >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{multiple * step:.10g}") for multiple in range(first, last + 1)]


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


@dataclass(frozen=True)
class Bar:
    """A length from 0 in one colour (`style` as of a series)."""

    name: str
    style: str
    value: float
    text: str = ""
    """What stands beside the name; empty: the value."""


def chart(title: str, series: Sequence[Series], *, x: str, y: str, zero: bool = False) -> Markup:
    """A figure with axes, legend and hover texts; `zero` draws the line where y is 0.

    Points that are not finite and series without points are left out; where nothing is left there is no figure.
    """
    shown = [one for one in map(_finite, series) if one.points]
    if not shown:
        return Markup("")
    across = AxisScale.over(point[0] for one in shown for point in one.points)
    up = AxisScale.over([*(point[1] for one in shown for point in one.points), *([0.0] if zero else [])])
    # layers and steps are counted: there is no half of one
    counted = all(float(point[0]).is_integer() for one in shown for point in one.points)
    ticks = across.ticks(whole=counted)
    pieces = [*_left(up, y), *_ticks("axis", across, ticks, "97.5%"), *_below(across, x, ticks)]
    if zero:
        height = 100 - up.at(0.0)
        pieces.append(Markup('<line class="axis" x1="0%" x2="100%" y1="{0}%" y2="{0}%"/>').format(height))
    pieces += [_curve(one, across, up) for one in shown if one.line and len(one.points) > 1]
    pieces += [mark for one in shown if one.mark for mark in _marks(one, across, up)]
    keys = [_key(one) for one in shown if one.key != ""]
    return _figure("chart", title, keys, HEIGHT, pieces, "".join(_description(one) for one in shown))


def bars(
    title: str, groups: Mapping[str, Sequence[Bar]], *, x: str, reference: tuple[float, str] | None = None
) -> Markup:
    """A figure of horizontal bars below their names; `reference` is a value that a line marks, and what it means.

    A group's name stands above its bars; an empty one takes no space. Bars that are not finite are left out, and groups
    without bars; where nothing is left there is no figure.
    """
    finite = {name: [bar for bar in group if math.isfinite(bar.value)] for name, group in groups.items()}
    shown = {name: group for name, group in finite.items() if group}
    if not shown:
        return Markup("")
    values = [bar.value for group in shown.values() for bar in group]
    across = AxisScale(0.0, (max([*values, reference[0] if reference else 0.0]) or 1.0) * (1 + PADDING))
    drawn, texts, words, top = [], [], [], 0
    for name, group in shown.items():
        if name:
            texts.append(Markup('<text class="group" x="0" y="{}">{}</text>').format(top + 16, name))
            top += GROUP_HEIGHT
        for bar in group:
            text = bar.text or general(bar.value)
            words.append(f"{name + ', ' if name else ''}{bar.name}: {text}")
            drawn.append(_bar(bar, across.at(bar.value), top, words[-1]))
            name_and_text = Markup('<text x="0" y="{}">{} <tspan class="value">{}</tspan></text>')
            texts.append(name_and_text.format(top + 14, bar.name, text))
            top += BAR_HEIGHT
    keys = []
    if reference:
        value, meaning = reference
        keys.append(_entry("", Markup('<line class="reference" x1="0" x2="22" y1="5" y2="5"/>'), meaning))
        line = Markup('<line class="reference" x1="{0}%" x2="{0}%" y1="0%" y2="100%"/>').format(across.at(value))
        drawn.append(line)
    # texts come last: their halo keeps them readable on what they cross
    ticks = across.ticks()
    pieces = [*_ticks("grid", across, ticks, "0%"), *drawn, *_below(across, x, ticks), *texts]
    return _figure("chart bars", title, keys, top, pieces, "; ".join(words))


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of equally many neighbours."""
    width = -(-len(points) // most)
    groups = [points[at : at + width] for at in range(0, len(points), width or 1)]
    return [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]


def _left(up: AxisScale, y: str) -> Iterable[Markup]:
    """The lines of a plot's grid, their values, and what they are."""
    for value in up.ticks():
        height = 100 - up.at(value)
        yield Markup('<line class="grid" x1="0%" x2="100%" y1="{0}%" y2="{0}%"/>').format(height)
        yield Markup('<text x="0%" y="{}%" dx="-8" dy="4" text-anchor="end">{}</text>').format(height, general(value))
    yield Markup('<text x="0%" y="0%" dx="-44" dy="-10">{}</text>').format(y)


def _below(across: AxisScale, x: str, ticks: Sequence[float]) -> Iterable[Markup]:
    """The axis under a plot."""
    for value in ticks:
        text = Markup('<text x="{}%" y="100%" dy="16" text-anchor="middle">{}</text>')
        yield text.format(across.at(value), general(value))
    yield Markup('<line class="axis" x1="0%" x2="100%" y1="100%" y2="100%"/>')
    yield Markup('<text x="100%" y="100%" dy="32" text-anchor="end">{}</text>').format(x)


def _ticks(look: str, across: AxisScale, ticks: Sequence[float], top: str) -> Iterable[Markup]:
    """Lines from the axis under a plot upwards to `top`."""
    for value in ticks:
        place = across.at(value)
        yield Markup('<line class="{0}" x1="{1}%" x2="{1}%" y1="100%" y2="{2}"/>').format(look, place, top)


def _bar(bar: Bar, width: float, top: int, hover: str) -> Markup:
    return Markup(
        '<g class="s-{}"><title>{}</title><rect class="bar" x="0" y="{}" width="{}%" height="{}"/></g>'
    ).format(bar.style, hover, top + 19, width, BAR_THICKNESS)


def _figure(look: str, title: str, keys: Sequence[Markup], height: int, pieces: Sequence[Markup], words: str) -> Markup:
    """A plot with its title and legend, and in words for who does not see it."""
    legend = Markup('<ul class="legend">{}</ul>').format(Markup("").join(keys)) if keys else ""
    return Markup(
        '<figure class="{0}"><figcaption>{1}</figcaption>{2}<div class="plot">'
        '<svg role="img" height="{3}" aria-label="{1}: {5}">{4}</svg></div></figure>'
    ).format(look, title, legend, height, Markup("").join(pieces), words)


def _finite(one: Series) -> Series:
    kept = [at for at, point in enumerate(one.points) if all(map(math.isfinite, point))]
    return replace(one, points=[one.points[at] for at in kept], hover=[one.hover[at] for at in kept if one.hover])


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
    return _entry(f"s-{one.style}", drawn, one.name if one.key is None else one.key)


def _entry(look: str, drawn: Markup, text: str) -> Markup:
    """A line of the legend."""
    return Markup('<li><svg class="{}" aria-hidden="true" viewBox="0 0 22 10">{}</svg>{}</li>').format(
        look, drawn, text
    )


def _description(one: Series) -> str:
    """A series in words, for who does not see it."""
    (_, first), (_, last) = one.points[0], one.points[-1]
    ys = [py for _, py in one.points]
    return (
        f"{one.name}, {len(ys)} points, from {general(first)} to {general(last)}, "
        f"lowest {general(min(ys))}, highest {general(max(ys))}. "
    )
