"""Pictures of a composition: what the weight search saw, and where the adapters collide. Nothing is measured here.

They are drawn from the values that search.json and interference.json hold, for a page beside the composed adapter and
for the evaluation's report alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from utils.artifacts import files
from utils.html import numbers, pages
from utils.html.charts import Series, chart

Record = Mapping[str, Any]

NO_DOMAIN_LOSS = "No dev documents: the domain loss was not measured, so what one loss costs the other is not known."
EXPLAINS = "The figures explain a result: neither search nor verdict uses them. Derivatives are at the weights in use."
ACTIVATION_SIZES = ("activation_first_to_base", "activation_second_to_base")
UPDATE_SIZES = ("first_norm", "second_norm")
# key, name, style, line
ANGLES = (
    ("activation_cosine", "cosine of the changes on task inputs", "composed", "solid"),
    ("cosine", "cosine of the updates", "composed", "dashed"),
    ("input_overlap", "overlap of the input subspaces", "other", "solid"),
    ("sign_conflict", "sign conflict", "task", "dashed"),
)
CURVE_STYLES = ("task", "domain", "other")


def write_search(record: Record, path: Path) -> None:
    """A page of what search.json holds. Raises ArtefactError when it cannot be written."""
    why = record["reason"].partition(": ")[2]  # the method's name stands before it
    chosen = Markup('<p class="lead">{}.</p><p>{}.</p>').format(_point(record["chosen"]), why[:1].upper() + why[1:])
    _write(path, "Composition weights chosen on dev", chosen, search(record))


def write_interference(record: Record, path: Path) -> None:
    """A page of what interference.json holds. Raises ArtefactError when it cannot be written."""
    items = Markup("").join(Markup("<li>{}</li>").format(effect) for effect in effects(record))
    above = Markup('<ul>{}</ul><p class="note">{}</p>').format(items, EXPLAINS)
    _write(path, "Where the adapters collide", above, interference(record))


def search(record: Record) -> list[Markup]:
    """Answer loss over the domain's weight, a curve for each task weight; and both losses with the Pareto front."""
    measured = [point for point in record["points"] if any(point["weights"])]
    chosen = record["chosen"]
    # the search moves further adapters only after the grid, which has them at 1
    grid = [point for point in measured if point["method"] == "sum" and set(point["weights"][2:]) <= {1.0}]
    rows: dict[float, list[Record]] = {}
    for point in sorted(grid, key=lambda p: p["weights"]):
        rows.setdefault(point["weights"][1], []).append(point)
    curves = [
        Series(
            f"task weight {weight:g}",
            CURVE_STYLES[at % 3],
            [(p["weights"][0], p["answer_nll"]) for p in row],
            ("solid", "dashed")[at // 3 % 2],
            ("dot", "ring")[at // 6 % 2],
            [_point(p) for p in row],
        )
        for at, (weight, row) in enumerate(sorted((w, row) for w, row in rows.items() if len(row) > 2))
    ]
    drawn = []
    if curves:
        if chosen["method"] == "sum":
            star = [(chosen["weights"][0], chosen["answer_nll"])]
            curves.append(Series("chosen", "composed", star, "", "star", [f"chosen: {_point(chosen)}"]))
        drawn.append(chart("Answer loss over the weights", curves, x="domain weight", y="answer loss on dev"))
    both = [point for point in measured if point["domain_nll"] is not None]
    if not both:
        return [*drawn, Markup('<p class="note">{}</p>').format(NO_DOMAIN_LOSS)]
    front = [point for point in record["pareto"] if any(point["weights"])]
    star = [chosen] if chosen["domain_nll"] is not None else []
    series = [
        Series("measured", "other", _losses(both), "", "dot", [_point(p) for p in both]),
        Series("Pareto front", "domain", _losses(front), "solid", "dot", [_point(p) for p in front]),
        Series("chosen", "composed", _losses(star), "", "star", [f"chosen: {_point(p)}" for p in star]),
    ]
    title = "What one loss costs the other"
    return [*drawn, chart(title, series, x="domain loss on dev", y="answer loss on dev")]


def effects(record: Record) -> list[Markup]:
    """What more of each adapter would do to each loss, a sentence each."""
    return [
        Markup(
            "More of the {} adapter would {} the {} loss "
            "(derivative {} nats per token and unit of weight, at a loss of {} on dev)."
        ).format(
            name,
            "raise" if sum(row) > 0 else "lower",
            loss,
            numbers.exact(sum(row), numbers.gain),
            numbers.exact(derivative["loss"], numbers.nats),
        )
        for loss, derivative in record["derivatives"].items()
        for name, row in zip(record["adapters"], derivative["per_layer"], strict=False)
    ]


def interference(record: Record) -> list[Markup]:
    """Per layer: the derivatives of both losses, sizes of the changes, and how much they point the same way."""
    names, per_layer, drawn = record["adapters"], record["per_layer"], []
    for loss, derivative in record["derivatives"].items():
        series = [
            Series(f"in the {name}'s weight", style, list(enumerate(row)))
            for name, style, row in zip(names, ("domain", "task"), derivative["per_layer"], strict=False)
        ]
        title = f"Derivative of the {loss} loss: above 0, more of it hurts"
        drawn.append(chart(title, series, x="layer", y="nats per token and unit of weight", zero=True))
    on_inputs = ACTIVATION_SIZES[0] in per_layer
    sizes = [
        Series(name, style, _known(per_layer.get(key, [])))
        for key, name, style in zip(
            ACTIVATION_SIZES if on_inputs else UPDATE_SIZES, names, ("domain", "task"), strict=False
        )
    ]
    size, unit = (
        ("Size of the change on task inputs, relative to W x", "ratio") if on_inputs else ("Size of the update", "norm")
    )
    drawn.append(chart(size, sizes, x="layer", y=unit, zero=True))
    angles = [Series(name, style, _known(per_layer.get(key, [])), line) for key, name, style, line in ANGLES]
    drawn.append(chart("Do they point the same way?", angles, x="layer", y="−1 to 1", zero=True))
    return [picture for picture in drawn if picture]


def _write(path: Path, title: str, above: Markup, drawn: Sequence[Markup]) -> None:
    note = f"Every number is in {path.with_suffix('.json').name}."
    body = Markup('<h1>{}</h1>{}<div class="charts">{}</div><p class="note">{}</p>')
    files.write_text(path, pages.shell(title, body.format(title, above, Markup("").join(drawn), note)))


def _losses(points: Sequence[Record]) -> list[tuple[float, float]]:
    return [(point["domain_nll"], point["answer_nll"]) for point in points]


def _point(point: Record) -> str:
    weights = ", ".join(f"{w:g}" for w in point["weights"]) if len(point["weights"]) <= 6 else "a weight per layer"
    domain = "" if point["domain_nll"] is None else f", domain loss {numbers.general(point['domain_nll'])}"
    # since 2026-11-30 a search measures some settings on a part of dev only
    where = "" if point.get("items", "all") == "all" else " (estimated from a part of dev)"
    return f"{point['method']} ({weights}): answer loss {numbers.general(point['answer_nll'])}{domain}{where}"


def _known(values: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(layer, value) for layer, value in enumerate(values) if value is not None]
