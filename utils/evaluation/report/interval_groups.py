"""Intervals that share an axis: what retrieval buys, and the measures of the kind of task. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from utils.evaluation.report import report_figures
from utils.html import numbers

# row -> its colour; every other row is grey
STYLES = {"domain": "domain", "task": "task", "composed": "composed"}
# kind of task -> the columns that are drawn for it
DRAWN = {
    "choice": ("choice_accuracy",),
    "classification": ("choice_accuracy",),
    "extraction": ("json_valid", "field_f1"),
    "long answer": ("chrf", "rouge_l"),
    "short answer": ("em", "f1"),
}
# largest confusion matrix that is drawn
MOST_DRAWN = 20


def group(title: str, axis: str, rows: list[dict[str, Any]], form: Callable[[float], str]) -> dict[str, Any]:
    """Rows with their pictures on one axis."""
    chart: dict[str, Any] = {"title": title, "axis": axis, "form": form, "rows": rows}
    chart["plain"] = numbers.nats if form is numbers.gain else form
    if rows:
        scale = report_figures.interval_scale([row["found"] for row in rows])
        chart["svg_axis"] = report_figures.axis_row(scale, "%" if form is numbers.share else "")
        for row in rows:
            label = f"{row['name']}: {in_words(row['found'], form)}"
            row["svg"] = report_figures.interval_row(row["found"], scale, row["style"], row["filled"], label)
    return chart


def against(interval: Mapping[str, Any]) -> dict[str, Any]:
    low, high = interval["low"], interval["high"]
    if low is not None and low > 0:
        return {"result": "better", "colour": "good", "filled": True}
    if high is not None and high < 0:
        return {"result": "worse", "colour": "bad", "filled": True}
    return {"result": "cannot tell", "colour": "warn", "filled": False}


def retrieval(results: Mapping[str, Any], primary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What retrieval, the adapters and both gain over the base, on one axis; None where nothing was retrieved."""
    if "retrieval" not in results:
        return None
    rows = [
        {
            "name": cell,
            "text": results["cells"][cell]["meaning"],
            "found": gain,
            "style": STYLES.get(cell, "other"),
            **against(gain),
        }
        for cell, gain in results["retrieval"]["gains"].items()
    ]
    axis = f"gain in {primary['title']} over the base model"
    return {**results["retrieval"], "group": group("Over the base model", axis, rows, numbers.gain)}


def task(results: Mapping[str, Any], measures: Sequence[Any]) -> dict[str, Any] | None:
    """What kind of task it is, its measures in every row on an axis each, and confusion matrices; None if not known."""
    kind = results.get("task")
    if not kind:
        return None
    cells = results["cells"]
    groups = [
        chart
        for measure in measures
        if measure.key in DRAWN[kind["name"]]
        and (chart := measured(cells, measure.title, measure.meaning, measure.of, measure.interval))["rows"]
    ]
    if kind.get("cells"):
        macro = {cell: one["macro_f1"] for cell, one in kind["cells"].items()}
        ends = {cell: one["interval"] for cell, one in kind["cells"].items()}
        named = {cell: {"meaning": cells[cell]["meaning"], "name": cell} for cell in macro}
        what = "mean F1 of the labels"
        groups.append(
            measured(named, "macro F1", what, lambda cell: macro[cell["name"]], lambda cell: ends[cell["name"]])
        )
    drawn = [cell for cell in ("task", "composed") if cell in kind.get("cells", {})]
    matrices = [(cell, confusion(kind["cells"][cell]["confusion"])) for cell in drawn]
    return {**kind, "groups": groups, "matrices": matrices if len(kind["labels"]) <= MOST_DRAWN else []}


def measured(
    cells: Mapping[str, Any],
    title: str,
    axis: str,
    value: Callable[[Any], float | None],
    interval: Callable[[Any], Sequence[float] | None],
) -> dict[str, Any]:
    """A measure in every row that has it, with its interval: a picture of rows and not of differences."""
    rows = []
    for name, cell in cells.items():
        if (estimate := value(cell)) is None:
            continue
        low, high = interval(cell) or (None, None)
        ends = {"estimate": estimate, "low": low, "high": high, "null": 0.0}
        rows.append({"name": name, "text": cell["meaning"], "found": ends, "style": STYLES.get(name, "other")})
    chart: dict[str, Any] = {"title": title, "axis": axis, "form": numbers.share, "rows": rows}
    if rows:
        scale = report_figures.interval_scale([row["found"] for row in rows])
        chart["svg_axis"] = report_figures.axis_row(scale, "%")
        for row in rows:
            label = f"{row['name']}: {title} {numbers.share(row['found']['estimate'])}"
            row["svg"] = report_figures.interval_row(row["found"], scale, row["style"], True, label)
    return chart


def confusion(counts: Sequence[Sequence[int]]) -> list[list[dict[str, Any]]]:
    """A confusion matrix with the share of its row in each cell, for the shade."""
    return [[{"count": count, "share": count / sum(row) if sum(row) else 0.0} for count in row] for row in counts]


def in_words(values: Mapping[str, Any], form: Callable[[float], str]) -> str:
    if values["low"] is None or values["high"] is None:
        return f"{form(values['estimate'])}, no interval: {values['clusters']} documents are too few"
    interval = f"95% interval {form(values['low'])} to {form(values['high'])}, against {form(values['null'])}"
    seen = f", enough documents to see {form(values['detectable'])}" if values.get("detectable") is not None else ""
    return f"{form(values['estimate'])}, {interval}{seen}"
