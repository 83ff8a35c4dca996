"""Where two adapters collide on a model: per layer how much each moves it and what that does to each loss.

The headline is the derivative of each loss in each adapter's weight at the weights that are used: a positive derivative
of the answer loss in the domain's weight says that more of the domain would hurt the task there. It is an
explanation; weights are chosen by a search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from utils.adapters.factors import Factors, norm
from utils.composition.collisions import collisions
from utils.composition.dev_losses import DevProbe
from utils.composition.methods import Recipe, weights_at
from utils.models.weights.tensor_names import layer_of

FIRST, SECOND = 0, 1


def explain(probe: DevProbe, recipe: Recipe) -> dict[str, Any]:
    """Per layer and per module figures about the first two adapters, as plain values. Missing data is left out."""
    parts, layers = probe.parts, probe.layers
    weights_kL = torch.tensor(
        [weights_at(f"model.layers.{layer}.x", recipe, len(parts), layers) for layer in range(layers)]
    ).T
    figures: dict[str, Any] = {"layers": layers, "adapters": ["domain", "task"], "derivatives": {}}
    answers, documents = probe.answer_batches(), probe.document_batches()
    for name, batches in (("answer", answers), ("domain", documents)):
        if batches:
            loss, gradient_kL = probe.gradient(weights_kL, batches)
            figures["derivatives"][name] = {"loss": loss, "per_layer": gradient_kL[:2].tolist()}
    modules: dict[str, dict[str, float]] = {
        name: asdict(collision) for name, collision in collisions(parts[FIRST], parts[SECOND]).items()
    }
    if answers:
        for name, overlap in probe.overlaps(FIRST, SECOND, answers).items():
            modules.setdefault(name, {}).update({f"activation_{key}": value for key, value in overlap.items()})
    figures["modules"] = modules
    figures["per_layer"] = {
        "first_norm": _per_layer(parts[FIRST], layers, norm),
        "second_norm": _per_layer(parts[SECOND], layers, norm),
        **{
            key: [
                _mean([m[key] for name, m in modules.items() if layer_of(name) == layer and key in m])
                for layer in range(layers)
            ]
            for key in sorted({key for m in modules.values() for key in m})
        },
    }
    return figures


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for a terminal: totals, then the layers that stand out."""
    text = []
    for loss, derivative in figures["derivatives"].items():
        totals = [sum(row) for row in derivative["per_layer"]]
        pairs = zip(figures["adapters"], totals, strict=True)
        shown = ", ".join(f"{name} {total:+.3f}" for name, total in pairs)
        text.append(f"  derivative of the {loss} loss ({derivative['loss']:.3f} per token) in the weight of: {shown}")
    answer = figures["derivatives"].get("answer")
    if answer:
        worst = sorted(range(figures["layers"]), key=lambda layer: -answer["per_layer"][FIRST][layer])[:3]
        where = ", ".join(f"{layer} ({answer['per_layer'][FIRST][layer]:+.3f})" for layer in worst)
        text.append(f"  layers where more of the domain would hurt the answers most: {where}")
    per_layer = figures["per_layer"]
    for key, what in (
        ("activation_cosine", "cosine of the two changes on task inputs"),
        ("cosine", "cosine of the two updates"),
        ("input_overlap", "overlap of their input subspaces"),
        ("sign_conflict", "share of the smaller update under the opposite sign"),
    ):
        values = [v for v in per_layer.get(key, []) if v is not None]
        if values:
            text.append(f"  {what}: {sum(values) / len(values):.3f} (layers {min(values):.3f} to {max(values):.3f})")
    return text


def _per_layer(factors: Factors, layers: int, size: Callable[[Any], float]) -> list[float]:
    """Root of the summed squares of a layer's modules."""
    sums = [0.0] * layers
    for name, f in factors.items():
        if (layer := layer_of(name)) is not None:
            sums[layer] += size(f) ** 2
    return [total**0.5 for total in sums]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
