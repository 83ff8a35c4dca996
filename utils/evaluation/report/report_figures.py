"""The pictures that only the report has: intervals and losses. Nothing is measured here.

An interval is null where it is infinite, as `results.plain` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from utils.html.charts import AxisScale, Series, chart, thinned
from utils.html.numbers import general, is_number

Values = Mapping[str, Any]


def interval_scale(intervals: Sequence[Values]) -> AxisScale:
    """An axis on which every interval and every null has its place; what could have been seen may run off it."""
    return AxisScale.over(
        one[key] for one in intervals for key in ("estimate", "low", "high", "null") if is_number(one.get(key))
    )


def interval_row(interval: Values, scale: AxisScale, style: str, filled: bool, label: str) -> Markup:
    """One line of a forest plot: the interval, what it is held against, and the band that is too small to be seen."""
    null, estimate, detectable = interval["null"], interval["estimate"], interval.get("detectable")
    pieces = [_across("grid", scale.at(value), "0%", "100%") for value in scale.ticks()]
    if is_number(detectable):
        left, right = scale.at(null), scale.at(null + detectable)
        pieces.append(
            Markup('<rect class="band" x="{}%" width="{:.3f}%" y="18%" height="64%"/>').format(left, right - left)
        )
    pieces.append(_across("null", scale.at(null), "0%", "100%"))
    ends = [interval["low"], interval["high"]]
    left, right = (scale.at(end) if is_number(end) else edge for end, edge in zip(ends, (0.0, 100.0), strict=True))
    open_ended = "" if all(is_number(end) for end in ends) else " dashed"
    pieces.append(
        Markup('<line class="interval{}" x1="{}%" x2="{}%" y1="50%" y2="50%"/>').format(open_ended, left, right)
    )
    pieces += [_across("end", scale.at(end), "38%", "62%") for end in ends if is_number(end)]
    if is_number(estimate):
        look = "dot" if filled else "ring"
        pieces.append(Markup('<circle class="{}" cx="{}%" cy="50%" r="5.5"/>').format(look, scale.at(estimate)))
    return Markup('<svg role="img" class="s-{}"><title>{}</title>{}</svg>').format(
        style, label, Markup("").join(pieces)
    )


def axis_row(scale: AxisScale, unit: str) -> Markup:
    """The axis below the rows, in percent or as plain numbers."""
    pieces = []
    for value in scale.ticks():
        place, label = scale.at(value), general(100 * value if unit else value) + unit
        pieces.append(_across("axis", place, "0%", "25%"))
        pieces.append(Markup('<text x="{}%" y="90%" text-anchor="middle">{}</text>').format(place, label))
    return Markup('<svg aria-hidden="true">{}</svg>').format(Markup("").join(pieces))


def losses(title: str, trained: Sequence[tuple[str, str, Sequence[Values]]]) -> Markup:
    """Training and dev losses over steps; `trained` has name, style and the lines of metrics.jsonl of each run.

    Runs without a colour of their own (style other) share one entry in the legend. Empty without any loss.
    """
    series, others, is_dev_labelled = [], 0, False
    # the quiet ones first, so that the others are drawn over them
    for name, style, lines in sorted(trained, key=lambda one: one[1] != "other"):
        steps = [(line["step"], line["loss"]) for line in lines if is_number(line.get("loss"))]
        dev = [(line["step"], line["dev_loss"]) for line in lines if is_number(line.get("dev_loss"))]
        others += style == "other"
        key = name if style != "other" else "other seeds and controls" if others == 1 else ""
        series.append(Series(f"{name}: training", style, thinned(steps), key=key))
        hover = [f"{name}: dev loss {loss:.3f} at step {step}" for step, loss in dev]
        series.append(
            Series(f"{name}: dev", style, dev, "dashed", "ring", hover, "" if is_dev_labelled else "its dev loss")
        )
        is_dev_labelled = is_dev_labelled or bool(dev)
    return chart(title, series, x="step", y="loss, nats per token")


def learning_curve(curve: Mapping[str, Any], kind: str, unit: str, loss: str) -> Markup:
    """Losses at the sizes that were trained, the power law through them, and one doubling ahead with its interval.

    `curve` is a kind of `results["learning_curve"]`, `unit` what its sizes are counted in, `loss` what its losses are.
    """
    sizes, losses = curve["sizes"], curve["losses"]
    ahead, end = 2 * sizes[-1], (curve["fitted"] or losses)[-1]
    series = [Series("measured", "composed", list(zip(sizes, losses, strict=True)), "", "dot")]
    if curve["fitted"] and curve["low"] is not None:
        law = [*zip(sizes, curve["fitted"], strict=True), (ahead, end - curve["estimate"])]
        low, high = end - curve["high"], end - curve["low"]
        hover = [f"with twice the {kind}: {low:.3f} to {high:.3f}"] * 2
        series.append(Series("power law", "other", law, "dashed"))
        series.append(Series("one doubling ahead", "other", [(ahead, low), (ahead, high)], "solid", "ring", hover))
    return chart(f"Twice the {kind}?", series, x=unit, y=loss)


def _across(look: str, place: float, top: str, bottom: str) -> Markup:
    return Markup('<line class="{0}" x1="{1}%" x2="{1}%" y1="{2}" y2="{3}"/>').format(look, place, top, bottom)
