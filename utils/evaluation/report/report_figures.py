"""The pictures of the report: intervals, losses, the weight search, interference. Nothing is measured here.

An interval is null where it is infinite, as `results.plain` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from utils.html.charts import AxisScale, Series, chart, thinned
from utils.html.numbers import general, is_number

Found = Mapping[str, Any]


def interval_scale(found: Sequence[Found]) -> AxisScale:
    """An axis on which every interval and every null has its place; what could have been seen may run off it."""
    return AxisScale.over(
        one[key] for one in found for key in ("estimate", "low", "high", "null") if is_number(one.get(key))
    )


def interval_row(found: Found, scale: AxisScale, style: str, filled: bool, said: str) -> Markup:
    """One line of a forest plot: the interval, what it is held against, and the band that is too small to be seen."""
    null, estimate, detectable = found["null"], found["estimate"], found.get("detectable")
    pieces = [_across("grid", scale.at(value), "0%", "100%") for value in scale.ticks()]
    if is_number(detectable):
        left, right = scale.at(null), scale.at(null + detectable)
        pieces.append(
            Markup('<rect class="band" x="{}%" width="{:.3f}%" y="18%" height="64%"/>').format(left, right - left)
        )
    pieces.append(_across("null", scale.at(null), "0%", "100%"))
    ends = [found["low"], found["high"]]
    left, right = (scale.at(end) if is_number(end) else edge for end, edge in zip(ends, (0.0, 100.0), strict=True))
    open_ended = "" if all(is_number(end) for end in ends) else " dashed"
    pieces.append(
        Markup('<line class="interval{}" x1="{}%" x2="{}%" y1="50%" y2="50%"/>').format(open_ended, left, right)
    )
    pieces += [_across("end", scale.at(end), "38%", "62%") for end in ends if is_number(end)]
    if is_number(estimate):
        look = "dot" if filled else "ring"
        pieces.append(Markup('<circle class="{}" cx="{}%" cy="50%" r="5.5"/>').format(look, scale.at(estimate)))
    return Markup('<svg role="img" class="s-{}"><title>{}</title>{}</svg>').format(style, said, Markup("").join(pieces))


def axis_row(scale: AxisScale, unit: str) -> Markup:
    """The axis below the rows, in percent or as plain numbers."""
    pieces = []
    for value in scale.ticks():
        place, said = scale.at(value), general(100 * value if unit else value) + unit
        pieces.append(_across("axis", place, "0%", "25%"))
        pieces.append(Markup('<text x="{}%" y="90%" text-anchor="middle">{}</text>').format(place, said))
    return Markup('<svg aria-hidden="true">{}</svg>').format(Markup("").join(pieces))


def losses(title: str, trained: Sequence[tuple[str, str, Sequence[Found]]]) -> Markup | str:
    """Training and dev losses over steps; `trained` has name, style and the lines of metrics.jsonl of each run.

    Runs without a colour of their own (style other) share one entry in the legend.
    """
    series, others, dev_said = [], 0, False
    # the quiet ones first, so that the others are drawn over them
    for name, style, lines in sorted(trained, key=lambda one: one[1] != "other"):
        steps = [(line["step"], line["loss"]) for line in lines if is_number(line.get("loss"))]
        dev = [(line["step"], line["dev_loss"]) for line in lines if is_number(line.get("dev_loss"))]
        others += style == "other"
        key = name if style != "other" else "other seeds and controls" if others == 1 else ""
        series.append(Series(f"{name}: training", style, thinned(steps), key=key))
        hover = [f"{name}: dev loss {loss:.3f} at step {step}" for step, loss in dev]
        series.append(Series(f"{name}: dev", style, dev, "dashed", "ring", hover, "" if dev_said else "its dev loss"))
        dev_said = dev_said or bool(dev)
    if not any(one.points for one in series):
        return ""
    return chart(title, series, x="step", y="loss, nats per token")


def search(found: Found) -> list[Markup]:
    """Answer loss over the domain's weight, a curve for each task weight; and both losses with the Pareto front."""
    measured = [point for point in found["points"] if any(point["weights"])]
    chosen, pictures = found["chosen"], []
    grid = [point for point in measured if point["method"] == "sum" and len(point["weights"]) == 2]
    rows: dict[float, list[Found]] = {}
    for point in sorted(grid, key=lambda p: p["weights"]):
        rows.setdefault(point["weights"][1], []).append(point)
    curves = [
        Series(
            f"task weight {weight:g}",
            ("task", "domain", "other")[at % 3],
            [(p["weights"][0], p["answer_nll"]) for p in row],
            ("solid", "dashed")[at // 3 % 2],
            "dot",
            [_point(p) for p in row],
        )
        for at, (weight, row) in enumerate(sorted((w, row) for w, row in rows.items() if len(row) > 2))
    ]
    if chosen["method"] == "sum" and len(chosen["weights"]) == 2:
        star = [(chosen["weights"][0], chosen["answer_nll"])]
        curves.append(Series("chosen", "composed", star, "", "star", [f"chosen: {_point(chosen)}"]))
    if len(curves) > 1:
        pictures.append(chart("Answer loss over the weights", curves, x="domain weight", y="answer loss on dev"))
    both = [point for point in measured if point["domain_nll"] is not None]
    if both:
        front = [point for point in found["pareto"] if any(point["weights"])]
        star = [chosen] if chosen["domain_nll"] is not None else []
        series = [
            Series("measured", "other", _losses(both), "", "dot", [_point(p) for p in both]),
            Series("Pareto front", "domain", _losses(front), "solid", "dot", [_point(p) for p in front]),
            Series("chosen", "composed", _losses(star), "", "star", [f"chosen: {_point(p)}" for p in star]),
        ]
        title = "What one loss costs the other"
        pictures.append(chart(title, series, x="domain loss on dev", y="answer loss on dev"))
    return pictures


def interference(found: Found) -> list[Markup]:
    """Per layer: the derivatives of both losses, sizes of the changes, and how much they point the same way."""
    names, per_layer, pictures = found["adapters"], found["per_layer"], []
    for loss, derivative in found["derivatives"].items():
        series = [
            Series(f"in the {name}'s weight", style, list(enumerate(row)), "solid", "")
            for name, style, row in zip(names, ("domain", "task"), derivative["per_layer"], strict=False)
        ]
        title = f"Derivative of the {loss} loss: above 0, more of it hurts"
        pictures.append(chart(title, series, x="layer", y="nats per token and unit of weight", zero=True))
    on_inputs = "activation_first_to_base" in per_layer
    keys = ("activation_first_to_base", "activation_second_to_base") if on_inputs else ("first_norm", "second_norm")
    sizes = [
        Series(name, style, _known(per_layer.get(key, [])))
        for key, name, style in zip(keys, names, ("domain", "task"), strict=False)
    ]
    size = "Size of the change on task inputs, relative to W x" if on_inputs else "Size of the update"
    angles = [
        Series(name, style, _known(per_layer.get(key, [])), line)
        for key, name, style, line in (
            ("activation_cosine", "cosine of the changes on task inputs", "composed", "solid"),
            ("cosine", "cosine of the updates", "composed", "dashed"),
            ("input_overlap", "overlap of the input subspaces", "other", "solid"),
            ("sign_conflict", "sign conflict", "task", "dashed"),
        )
    ]
    for title, drawn, y in ((size, sizes, "ratio"), ("Do they point the same way?", angles, "−1 to 1")):
        if any(one.points for one in drawn):
            pictures.append(chart(title, drawn, x="layer", y=y, zero=True))
    return pictures


def _across(look: str, place: float, top: str, bottom: str) -> Markup:
    return Markup('<line class="{0}" x1="{1}%" x2="{1}%" y1="{2}" y2="{3}"/>').format(look, place, top, bottom)


def _losses(points: Sequence[Found]) -> list[tuple[float, float]]:
    return [(point["domain_nll"], point["answer_nll"]) for point in points]


def _point(point: Found) -> str:
    weights = ", ".join(f"{w:g}" for w in point["weights"]) if len(point["weights"]) <= 6 else "a weight per layer"
    domain = "" if point["domain_nll"] is None else f", domain loss {general(point['domain_nll'])}"
    return f"{point['method']} ({weights}): answer loss {general(point['answer_nll'])}{domain}"


def _known(values: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(layer, value) for layer, value in enumerate(values) if value is not None]
