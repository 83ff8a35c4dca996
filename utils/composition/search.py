"""Choosing the weights on dev: the simplest method within one standard error of the best, that keeps the domain.

Pure: losses come from functions that are called with a method and weights. The objective is answer NLL per token with
the end of turn; it is sought among the weights that keep a given share of the domain adapter's gain on dev documents.
That share is an estimate, and the best answers lie at the border of what is allowed: so its lower confidence limit has
to be enough, where any is. Where good weights lie is found on a part of dev by a model of the losses; what is compared
and chosen was really measured on all of dev.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.composition.methods import METHODS, SUM
from utils.composition.weights import compass, dev_parts
from utils.composition.weights.modelled_search import NOTHING, ModelledSearch
from utils.composition.weights.points import SURE, Allows, Evaluate, Keeping, Point, best_of, one, paired, pareto

FOLDS = 2
# nats per answer token that keeping the domain may cost without being mentioned
WORTH_SAYING = 0.05
# how often what was found on a part of dev is measured on all of it, and looked for again with what that says
CONFIRMATIONS = 3


@dataclass(frozen=True)
class Champion:
    """The best of one method, and its paired loss against the best of all (positive is worse)."""

    label: str
    point: Point
    difference: float
    standard_error: float
    feasible: bool


@dataclass(frozen=True)
class ChosenWeights:
    """What was found. `chosen` has the weights to use; `points` is everything that was measured on all of dev.

    `estimates` are the settings that were measured on a part of it only, as one item each: what all of dev would say,
    by what the two differ by where both were measured. `notes` say where the model of the losses was not enough.
    """

    chosen: Point
    champions: tuple[Champion, ...]
    points: tuple[Point, ...]
    domain_gain: float | None
    reason: str
    estimates: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()


# (start weights, documents to fit on) -> one weight per layer for each adapter
FitPerLayer = Callable[[tuple[float, ...], Sequence[str]], tuple[float, ...]]


def search(
    evaluate: Evaluate,
    adapters: int,
    methods: Sequence[str],
    *,
    retention: float,
    fit_per_layer: FitPerLayer | None = None,
    on_part: Evaluate | None = None,
    on_documents: Evaluate | None = None,
) -> ChosenWeights:
    """Weights for `adapters` adapters of which the first is the domain's.

    The sum is always searched; of `methods` those whose row in the registry says how. `fit_per_layer` serves the fitted
    ones, which are left out without it. `on_part` has the losses of the first items of `evaluate` alone, and
    `on_documents` those of the part's questions and of all documents: of base and domain adapter no more is needed.
    """
    ones, nothing = (1.0,) * adapters, (0.0,) * adapters
    dev = _Dev(evaluate, on_part or evaluate, ones)
    dev.alone = tuple((on_documents or dev.measure)(SUM, weights) for weights in (nothing, (1.0, *nothing[1:])))
    keeping = Keeping(*dev.alone, retention)
    model = ModelledSearch(dev.on_part, adapters, dev.notes.append, dev.corrected)
    if dev.confirmed(SUM, lambda: model.best_sums(dev.keeping_on_part(keeping))):
        dev.notes.append("a part of dev does not speak for all of it: the weights of the sum are sought on all of it")
        ModelledSearch(dev.measure, adapters, dev.notes.append).best_sums(keeping)
    tried = [point for point in dev.seen.values() if any(point.weights[1:])]
    allows = keeping.rule(tried)
    best = best_of(tried, allows)
    candidates = [("sum at 1", dev.plain), (SUM, best)]
    final: dict[str, Point] = {}
    for name, method in METHODS.items():
        if name == SUM or name not in methods:
            continue
        if method.search == "steps" and method.per_adapter:

            def better(name: str = name) -> list[Point]:
                start = dev.corrected(dev.on_part(SUM, best.weights))
                candidate = model.best_of_method(name, start, dev.keeping_on_part(keeping))
                return [candidate] if dev.promises(candidate, start) else []

            dev.confirmed(name, better)
            if own := [point for point in dev.seen.values() if point.method == name]:
                candidates.append((name, best_of(own, allows)))
        if method.search == "fit" and fit_per_layer is not None:
            crossed, final[name] = _fitted(dev.measure, name, fit_per_layer, best)
            candidates.append((name, crossed))
    return _choose(candidates, final, dev, allows, keeping, list(model.seen.values()))


def search_alone(evaluate: Evaluate) -> ChosenWeights:
    """The weight of one adapter without a domain below it, by the rule that `search` has: answers alone decide.

    For the fair baseline: a composed model whose task adapter was given its weight is compared with one that was too.
    """
    measure, seen = _once(evaluate)
    start = best_of([measure(SUM, (weight,)) for weight in compass.COARSE[1:]])
    best = compass.refined(measure, SUM, start, lambda _: True)
    candidates = [("sum at 1", measure(SUM, (1.0,))), (SUM, best)]
    champions = tuple(Champion(label, p, *paired(p, best), True) for label, p in candidates)
    chosen = next(c for c in champions if c.difference <= one(c.standard_error))
    reason = f"{chosen.label}: the simplest within one standard error of the best on dev"
    return ChosenWeights(chosen.point, champions, tuple(seen.values()), None, reason)


class _Dev:
    """All of dev and a part of it: what was measured on each, and what the one says about the other."""

    def __init__(self, evaluate: Evaluate, on_part: Evaluate, ones: tuple[float, ...]):
        self.measure, self.seen = _once(evaluate)
        self.on_part = self.measure if on_part is evaluate else _once(on_part)[0]
        self.notes: list[str] = []
        # base and domain adapter, whose documents are all measured
        self.alone: tuple[Point, ...] = ()
        self.plain, self.adapters = self.measure(SUM, ones), len(ones)
        # a standard error on all of dev is smaller by this
        self.scale = math.sqrt(len(self.on_part(SUM, ones).answer_nlls) / len(self.plain.answer_nlls))

    def corrected(self, point: Point) -> Point:
        """A point of the part with the losses that all of dev has on average, as far as what it measured tells."""
        if self.on_part is self.measure:
            return point
        whole = {(p.method, p.weights): p for p in (*self.alone, *self.seen.values())}
        known = [(p, self.on_part(p.method, p.weights)) for p in whole.values()]
        return dev_parts.corrected(point, known, self.adapters)

    def keeping_on_part(self, keeping: Keeping) -> Keeping:
        """What has to be kept, with the part speaking for all of dev."""
        base, domain = (self.corrected(self.on_part(SUM, p.weights)) for p in (keeping.base, keeping.domain))
        part, of = len(base.document_nlls), len(keeping.base.document_nlls)
        return Keeping(base, domain, keeping.retention, math.sqrt(part / of) if of else 1.0)

    def confirmed(self, name: str, find: Callable[[], list[Point]]) -> bool:
        """Measure on all of dev the best that `find` finds on the part, until that is known there.

        The first time, if the best is known already, the next best stands for it. Returns whether that did not settle,
        or one was not what the part had let expect, beyond what its items can tell.
        """
        for attempt in range(CONFIRMATIONS):
            points = find()
            new = [p for p in points if (name, p.weights) not in self.seen]
            if not points:
                self.notes.append(f"{name}: not better than the sum by a standard error where it was tried")
            if not new or (attempt > 0 and new[0] != points[0]):
                return False
            measured = self.measure(name, new[0].weights)
            # of the part, as all of dev tells it: a few items tell even their error badly
            error = one(paired(measured, self.plain)[1]) / self.scale
            if abs(measured.answer_nll - new[0].answer_nll) > SURE * error + NOTHING:
                return True
        return True

    def promises(self, point: Point, start: Point) -> bool:
        """Whether a point of the part is better than another by a standard error of all of dev."""
        difference, error = paired(point, start)
        return -difference >= max(one(error) * self.scale, NOTHING)

    def estimate(self, point: Point) -> Point:
        """What all of dev would say of a point of the part, as one item."""
        here = self.corrected(point)
        documents = () if here.domain_nll is None else (here.domain_nll,)
        return Point(point.method, point.weights, (here.answer_nll,), (1,), ("",), documents, (1,) * len(documents))


def to_json(choice: ChosenWeights) -> dict[str, Any]:
    """The search as plain values, without the losses of single items."""

    def slim(point: Point) -> dict[str, Any]:
        return {
            "method": point.method,
            "weights": list(point.weights),
            "answer_nll": point.answer_nll,
            "domain_nll": point.domain_nll,
        }

    return {
        "chosen": slim(choice.chosen),
        "reason": choice.reason,
        "notes": list(choice.notes),
        "domain_gain": choice.domain_gain,
        "champions": [
            {
                "label": c.label,
                **slim(c.point),
                "difference_to_best": c.difference,
                "standard_error": c.standard_error if math.isfinite(c.standard_error) else None,
                "keeps_the_domain": c.feasible,
            }
            for c in choice.champions
        ],
        "pareto": [slim(point) for point in pareto([*choice.points, *choice.estimates])],
        "points": [
            *(slim(point) | {"items": "all"} for point in choice.points),
            *(slim(point) | {"items": "a part, corrected"} for point in choice.estimates),
        ],
    }


def _once(evaluate: Evaluate) -> tuple[Evaluate, dict[tuple[str, tuple[float, ...]], Point]]:
    """(`evaluate`, asked once for each setting; what it has said so far)."""
    seen: dict[tuple[str, tuple[float, ...]], Point] = {}

    def measure(method: str, weights: tuple[float, ...]) -> Point:
        if (method, weights) not in seen:
            seen[method, weights] = evaluate(method, weights)
        return seen[method, weights]

    return measure, seen


def _fitted(measure: Evaluate, name: str, fit: FitPerLayer, start: Point) -> tuple[Point, Point]:
    """(out-of-fold losses, weights fitted on all of dev): so many weights would win on the data they were fitted to."""
    documents = sorted(set(start.clusters))
    halves = [documents[i::FOLDS] for i in range(FOLDS)]
    whole = measure(name, fit(start.weights, documents))
    if len(documents) < FOLDS:
        return whole, whole
    points = [measure(name, fit(start.weights, half)) for half in halves]
    fold = {document: i for i, half in enumerate(halves) for document in half}
    # an item's loss comes from the weights that were fitted without its document
    nlls = tuple(points[1 - fold[cluster]].answer_nlls[i] for i, cluster in enumerate(start.clusters))
    documents_nlls = tuple(sum(both) / FOLDS for both in zip(*(point.document_nlls for point in points), strict=True))
    return replace(whole, answer_nlls=nlls, document_nlls=documents_nlls), whole


def _choose(
    candidates: Sequence[tuple[str, Point]],
    final: dict[str, Point],
    dev: _Dev,
    allows: Allows,
    keeping: Keeping,
    on_part: Sequence[Point],
) -> ChosenWeights:
    points = tuple(dev.seen.values())
    estimates = tuple(dev.estimate(point) for point in on_part if (point.method, point.weights) not in dev.seen)
    gain, share = keeping.gain, f"{keeping.retention:.0%} of the domain gain"
    allowed = [point for _, point in candidates if allows(point)]
    best = best_of(allowed or [point for _, point in candidates])
    champions = tuple(Champion(label, p, *paired(p, best), allows(p)) for label, p in candidates)
    good = [c for c in champions if (c.feasible or not allowed) and c.difference <= one(c.standard_error)]
    chosen = good[0]
    if gain is None:
        constraint = "there are no dev documents to keep a domain gain on"
    elif gain <= 0:
        constraint = "the domain adapter alone does not gain on dev documents, so there is nothing to keep"
    elif not allowed:
        constraint = f"no weights keep {share}, so answers alone decide"
    elif allows == keeping.surely:
        constraint = f"at least {share} is kept, with 95% confidence over {len(chosen.point.document_nlls)} documents"
    else:
        count = len(chosen.point.document_nlls)
        constraint = f"at least {share} is kept on dev, whose {count} document{'s are' * (count > 1) or ' is'} no proof"
    # the two goals may be at odds, and then a person has to know the price
    price = chosen.point.answer_nll - best_of([p for p in (*points, *estimates) if p.method == SUM]).answer_nll
    if allowed and gain is not None and gain > 0 and price >= WORTH_SAYING:
        constraint += f", which costs {price:.2f} nats per answer token"
    reason = f"{chosen.label}: the simplest within one standard error of the best on dev; {constraint}"
    final_point = final.get(chosen.label, chosen.point)
    return ChosenWeights(final_point, champions, points, gain, reason, estimates, tuple(dev.notes))
