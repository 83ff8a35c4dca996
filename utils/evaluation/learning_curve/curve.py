"""The learning curve of an evaluation: every size scored on the test items of the other rows, and what follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from utils.adapters import adapter_files
from utils.artifacts.runs import Run
from utils.composition.methods import compose
from utils.evaluation import scored_rows
from utils.evaluation.intervals import MIN_CLUSTERS
from utils.evaluation.learning_curve.curve_runs import CurvePoint, CurveRuns
from utils.evaluation.learning_curve.power_law import OneDoubling, one_doubling
from utils.evaluation.metrics.primary import PrimaryMetric
from utils.evaluation.run_groups import ComparedRuns
from utils.evaluation.scored_rows import Material, ModelRow
from utils.models.base_model import BaseModel

NATS = "nats per token"
NO_DOCUMENTS, NO_VALUES = "there are no held-out documents", "no test question has a value in the primary metric"
UNTOLD = "three sizes cannot tell a power law from a curve of another form, which would make this wrong"
BENT = "these losses bend away from a power law, so the interval also covers what their curve says"


def results(
    config: Config,
    base: BaseModel,
    parts: ComparedRuns,
    curve: CurveRuns,
    on: Material,
    raw: Mapping[str, Any],
    primary: PrimaryMetric,
    directory: Path,
) -> dict[str, Any]:
    """What results.json says about more data; `raw` has the scores of the other rows, the whole data's among them.

    The loss is that of gold answers, or what is missing to the best value of another primary metric.
    """
    of_documents = parts.which_alone == "domain"
    rows = {
        point.name(kind): ModelRow(point.name(kind), None, _factors(base, parts, point))
        for kind, points in curve.points.items()
        for point in points
        if not point.is_whole
    }
    kept = {name: packed for name, packed in on.documents.items() if of_documents and name == "heldout"}
    material = replace(on, documents=kept, answer_examples=on.answer_examples if primary.generates else [])
    scored = scored_rows.score(config, base, list(rows.values()), material, directory)
    whole = next(scores for name, scores in raw.items() if name == f"{_cell(parts)}-seed{parts.first.seed}")
    kinds: dict[str, Any] = {}
    unit = NATS if of_documents else primary.unit
    missing = dict(curve.missing)
    for kind, points in curve.points.items():
        scores = [whole if point.is_whole else scored[point.name(kind)] for point in points]
        loss_KN, weights, clusters, unseen = _losses(scores, None if of_documents else primary)
        if not clusters:
            missing[kind] = NO_DOCUMENTS if of_documents else NO_VALUES
            continue
        how: dict[str, Any] = {"resamples": config.evaluate.resamples, "seed": config.run.seed, "unseen": unseen}
        doubling = one_doubling([point.size for point in points], loss_KN, weights, clusters, **how)
        kinds[kind] = plain(kind, doubling, unit)
    return {
        "of": _cell(parts),
        "about": "held-out documents" if of_documents else "gold answers" if unit == NATS else "answers",
        "unit": unit,
        "loss": f"1 - {primary.title}" if unit != NATS else f"loss, {NATS}",
        "kinds": kinds,
        "missing": missing,
        "sentence": sentence(kinds, missing),
    }


def plain(kind: str, doubling: OneDoubling, unit: str = NATS) -> dict[str, Any]:
    """As JSON values, infinite ones as null, with its sentence."""
    values = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in asdict(doubling).items()}
    return {**values, "is_shown": doubling.is_shown, "sentence": one_sentence(kind, doubling, unit)}


def one_sentence(kind: str, doubling: OneDoubling, unit: str = NATS) -> str:
    """What twice the data of this kind would bring."""
    if doubling.clusters < MIN_CLUSTERS:
        return f"twice the {kind}: not known, {doubling.clusters} documents are too few for an interval"
    if not math.isfinite(doubling.low):
        return f"twice the {kind}: not known, a loss of 0 lies on no power law"
    size = f"{doubling.estimate:+.3f} [{doubling.low:+.3f}, {doubling.high:+.3f}] {unit}"
    gain = size if doubling.is_shown else f"not distinguishable from nothing ({size})"
    doubts = [BENT] * doubling.is_bent + [UNTOLD] * doubling.is_untold
    return "; ".join([f"twice the {kind}: {gain}", *doubts])


def sentence(kinds: Mapping[str, Any], missing: Mapping[str, str]) -> str:
    """Everything that is said about more data, in one line."""
    sentences = [one["sentence"] for one in kinds.values()]
    return "; ".join([*sentences, *(f"twice the {kind}: not known, {why}" for kind, why in missing.items())])


def lines(results: Mapping[str, Any]) -> list[str]:
    """For a terminal; empty without a learning curve."""
    curve = results.get("learning_curve")
    if not curve:
        return []
    what = f"loss of {curve['about']} saved by" if curve["unit"] == NATS else f"{curve['unit']} gained by"
    sentences = [f"Would more data help? One doubling ahead, {what} {curve['of']}:"]
    sentences += [f"  {one['sentence']}" for one in curve["kinds"].values()]
    return [*sentences, *(f"  twice the {kind}: not known, {why}" for kind, why in curve["missing"].items())]


def _cell(parts: ComparedRuns) -> str:
    return parts.which_alone or "composed"


def _factors(base: BaseModel, parts: ComparedRuns, point: CurvePoint) -> Any:
    """The adapters of one size, put together as those that are judged are."""

    def load(*runs: Run | None) -> list[Any]:
        return [adapter_files.load(run.adapter, base) for run in runs if run is not None]

    if parts.alone is not None:
        own = point.task if parts.which_alone == "task" else point.domain
        return compose([*load(own), *parts.alone.parts[1:]], parts.alone.recipe)
    return compose([*load(point.domain, point.task), *parts.composed.parts[2:]], parts.composed.recipe)


def _losses(
    scores: Sequence[Mapping[str, Any]], primary: PrimaryMetric | None
) -> tuple[np.ndarray, list[float], list[str], float]:
    """Losses (K, N) of held-out documents, or by the primary metric: with weights and clusters of the items, and the
    largest difference that an item may have where values tie."""
    if primary is None:
        table = [one.get("heldout") or [] for one in scores]
        losses = np.array([[d["nll"] for d in row] for row in table], dtype=float)
        return losses, [d["tokens"] for d in table[0]], [d["name"] for d in table[0]], 0.0
    by_size = [primary.scores([one]) for one in scores]
    weights = list(by_size[0].weights)
    # values are counted from 0 to 1: what is missing to 1 is the loss
    best = np.array(weights) * float(primary.higher_is_better)
    loss_KN = np.concatenate([one.loss_SN for one in by_size]) + best
    return loss_KN, weights, list(by_size[0].clusters), primary.span or 0.0
