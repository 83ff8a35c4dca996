"""Pictures of a composition: what the weight search saw, and where the adapters collide. Nothing is measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.composition.search import ChosenWeights, Point, pareto

DOMAIN, TASK, CHOSEN = "#1f77b4", "#d62728", "#2ca02c"
DOTS_PER_INCH = 120


def search_picture(choice: ChosenWeights, path: Path) -> None:
    """Left: answer loss over the domain's weight, a curve per task weight; right: both losses and the Pareto front."""
    figure = _figure(11, 4.5)
    curves, front = figure.subplots(1, 2)
    grid = [p for p in choice.points if p.method == "sum" and any(p.weights)]
    for task_weight in sorted({p.weights[1] for p in grid}):
        row = sorted((p for p in grid if p.weights[1] == task_weight), key=lambda p: p.weights[0])
        if len(row) > 1:
            xs = [p.weights[0] for p in row]
            curves.plot(xs, [p.answer_nll for p in row], marker="o", markersize=3, label=f"task weight {task_weight:g}")
    if choice.chosen.method == "sum":
        curves.plot(choice.chosen.weights[0], choice.chosen.answer_nll, marker="*", markersize=14, color=CHOSEN)
    curves.set_xlabel("domain weight")
    curves.set_ylabel("answer and end-of-turn loss per token on dev")
    curves.legend(fontsize=8)
    shown = [p for p in choice.points if p.domain_nll is not None and any(p.weights)]
    if shown:
        front.scatter(
            [p.domain_nll for p in shown], [p.answer_nll for p in shown], s=14, color="#b0b0b0", label="measured"
        )
        best = pareto(shown)
        front.plot(
            [p.domain_nll for p in best], [p.answer_nll for p in best], color=DOMAIN, marker="o", label="Pareto front"
        )
        if choice.chosen.domain_nll is not None:
            where = (choice.chosen.domain_nll, choice.chosen.answer_nll)
            front.plot(*where, marker="*", markersize=14, color=CHOSEN, linestyle="none", label="chosen")
        front.legend(fontsize=8)
    else:
        front.text(
            0.5, 0.5, "no dev documents: the domain loss was not measured", ha="center", transform=front.transAxes
        )
    front.set_xlabel("domain loss per token on dev documents")
    front.set_ylabel("answer and end-of-turn loss per token on dev")
    figure.suptitle(f"{choice.chosen.method} {_weights(choice.chosen)}: {choice.reason.partition(': ')[2]}", fontsize=9)
    figure.savefig(path)


def interference_picture(found: dict[str, Any], path: Path) -> None:
    """Derivatives of both losses, sizes, activations and angles, by layer."""
    figure = _figure(11, 8)
    (answer, domain), (sizes, angles) = figure.subplots(2, 2)
    layers = range(found["layers"])
    per_layer = found["per_layer"]
    for axis, loss in ((answer, "answer"), (domain, "domain")):
        derivative = found["derivatives"].get(loss)
        if derivative:
            for row, name, colour in zip(derivative["per_layer"], found["adapters"], (DOMAIN, TASK), strict=True):
                axis.plot(layers, row, color=colour, label=f"in the {name}'s weight")
            axis.axhline(0, color="black", linewidth=0.8)
            axis.legend(fontsize=8)
        axis.set_title(f"derivative of the {loss} loss (above 0: more of it hurts)", fontsize=10)
    activations = "activation_first_to_base" in per_layer
    keys = ("activation_first_to_base", "activation_second_to_base") if activations else ("first_norm", "second_norm")
    for key, name, colour in zip(keys, found["adapters"], (DOMAIN, TASK), strict=True):
        sizes.plot(layers, per_layer[key], color=colour, label=name)
    sizes.set_title(
        "size of the change on task inputs, relative to W x" if activations else "size of the update", fontsize=10
    )
    sizes.set_ylim(bottom=0)
    sizes.legend(fontsize=8)
    for key, name in (
        ("activation_cosine", "cosine on task inputs"),
        ("cosine", "cosine of the updates"),
        ("input_overlap", "input subspaces"),
        ("sign_conflict", "sign conflict"),
    ):
        if key in per_layer:
            angles.plot(layers, per_layer[key], label=name)
    angles.axhline(0, color="black", linewidth=0.8)
    angles.set_title("angles, overlap and conflict", fontsize=10)
    angles.legend(fontsize=8, loc="center right")  # overlap lies near 1, cosines near 0
    for axis in (answer, domain, sizes, angles):
        axis.set_xlabel("layer")
    figure.savefig(path)


def _weights(point: Point) -> str:
    return f"({', '.join(f'{w:g}' for w in point.weights)})" if len(point.weights) <= 6 else "with a weight per layer"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # not pyplot: no display, no global state
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
