"""Choosing the weights on dev: grid, local refinement, Pareto front, and the simplest method within one standard error.

Pure: losses come from a function that is called with a method and weights. The objective is answer NLL per token with
the end of turn, because without it weights win at which answers no longer end; it is sought among the weights that keep
a given share of the domain adapter's gain on dev documents. That share is an estimate, and the best answers lie at the
border of what is allowed: so its lower confidence limit has to be enough, where any is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.composition.methods import METHODS, SUM

COARSE = (0.0, 0.5, 1.0, 1.5)
STEPS = (0.25, 0.125)
# a refinement that still improves after so many evaluations has left what a dev split can tell
MAX_REFINEMENTS = 32
FOLDS = 2
# nats per answer token that keeping the domain may cost without being mentioned
WORTH_SAYING = 0.05
# one-sided 95% of a normal distribution
SURE = 1.645


@dataclass(frozen=True)
class Point:
    """Losses at one setting: NLL sum and token count of each dev answer, its document; the same of each dev document.

    An answer's NLL and tokens include its end of turn.
    """

    method: str
    weights: tuple[float, ...]
    answer_nlls: tuple[float, ...]
    answer_tokens: tuple[int, ...]
    clusters: tuple[str, ...]
    document_nlls: tuple[float, ...] = ()
    document_tokens: tuple[int, ...] = ()

    @property
    def answer_nll(self) -> float:
        return sum(self.answer_nlls) / sum(self.answer_tokens)

    @property
    def domain_nll(self) -> float | None:
        return sum(self.document_nlls) / sum(self.document_tokens) if self.document_tokens else None


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
    """What was found. `chosen` has the weights to use; `points` is everything that was measured."""

    chosen: Point
    champions: tuple[Champion, ...]
    points: tuple[Point, ...]
    domain_gain: float | None
    reason: str


Evaluate = Callable[[str, tuple[float, ...]], Point]
# (start weights, documents to fit on) -> one weight per layer for each adapter
FitPerLayer = Callable[[tuple[float, ...], Sequence[str]], tuple[float, ...]]


def search(
    evaluate: Evaluate,
    adapters: int,
    methods: Sequence[str],
    *,
    retention: float,
    fit_per_layer: FitPerLayer | None = None,
) -> ChosenWeights:
    """Weights for `adapters` adapters of which the first is the domain's.

    The sum is always searched; of `methods` those whose row in the registry says how. `fit_per_layer` serves the fitted
    ones, which are left out without it.
    """
    measure, seen = _once(evaluate)
    ones, nothing = (1.0,) * adapters, (0.0,) * adapters
    base, domain = measure(SUM, nothing), measure(SUM, (1.0, *nothing[1:]))
    keeping = Keeping(base, domain, retention)
    grid = _grid(measure, adapters)
    if not any(map(keeping.likely, grid)):
        grid.append(_towards_keeping(measure, max(grid, key=lambda p: keeping.share(p)[0]), keeping))
    # where nothing is surely enough, what is enough by its value; where nothing is, everything
    feasible = next((rule for rule in (keeping.surely, keeping.likely) if any(map(rule, grid))), keeping.likely)
    start = _best([p for p in grid if feasible(p)] or grid)
    best = _refined(measure, SUM, start, feasible)
    candidates = [("sum at 1", measure(SUM, ones)), (SUM, best)]
    final: dict[str, Point] = {}
    for name, method in METHODS.items():
        if name == SUM or name not in methods:
            continue
        if method.search == "steps" and method.per_adapter:
            start = measure(name, tuple(w for weight in best.weights for w in (weight,) * method.per_adapter))
            candidates.append((name, _refined(measure, name, start, feasible)))
        if method.search == "fit" and fit_per_layer is not None:
            crossed, final[name] = _fitted(measure, name, fit_per_layer, best)
            candidates.append((name, crossed))
    return _choose(candidates, final, tuple(seen.values()), feasible, keeping)


def search_alone(evaluate: Evaluate) -> ChosenWeights:
    """The weight of one adapter without a domain below it, by the rule that `search` has: answers alone decide.

    For the fair baseline: a composed model whose task adapter was given its weight is compared with one that was too.
    """
    measure, seen = _once(evaluate)
    best = _refined(measure, SUM, _best([measure(SUM, (weight,)) for weight in COARSE[1:]]), lambda _: True)
    candidates = [("sum at 1", measure(SUM, (1.0,))), (SUM, best)]
    champions = tuple(Champion(label, p, *paired(p, best), True) for label, p in candidates)
    chosen = next(c for c in champions if c.difference <= _one(c.standard_error))
    reason = f"{chosen.label}: the simplest within one standard error of the best on dev"
    return ChosenWeights(chosen.point, champions, tuple(seen.values()), None, reason)


@dataclass(frozen=True)
class Keeping:
    """What has to be left of the domain adapter's gain on dev documents."""

    base: Point
    domain: Point
    retention: float

    @property
    def gain(self) -> float | None:
        """Nats per token that the domain adapter gains; None without documents."""
        if self.base.domain_nll is None or self.domain.domain_nll is None:
            return None
        return self.base.domain_nll - self.domain.domain_nll

    def share(self, point: Point) -> tuple[float, float]:
        """(share of the gain that is kept, its standard error over documents); infinite when there is none to keep.

        The error is that of a ratio of sums, linearised as in `paired`; a single document does not tell it.
        """
        if not self.gain or self.gain <= 0 or not point.document_nlls:
            return math.inf, 0.0
        gains = [b - d for b, d in zip(self.base.document_nlls, self.domain.document_nlls, strict=True)]
        kept = [b - p for b, p in zip(self.base.document_nlls, point.document_nlls, strict=True)]
        share = sum(kept) / sum(gains)
        residuals = [k - share * g for k, g in zip(kept, gains, strict=True)]
        return share, _error_of_sum(residuals) / sum(gains) if len(residuals) > 1 else math.inf

    def surely(self, point: Point) -> bool:
        """The lower limit of the share (one-sided, 95%) is enough."""
        share, error = self.share(point)
        return share - SURE * error >= self.retention

    def likely(self, point: Point) -> bool:
        """The share itself is enough."""
        return self.share(point)[0] >= self.retention


def paired(point: Point, other: Point) -> tuple[float, float]:
    """(difference of NLL per token, its standard error over documents), paired item by item.

    The error is that of a ratio of sums with whole documents as the unit (linearised, as in survey sampling).
    """
    difference = point.answer_nll - other.answer_nll
    total = sum(point.answer_tokens)
    residuals: dict[str, float] = {}
    rows = zip(point.answer_nlls, other.answer_nlls, point.answer_tokens, point.clusters, strict=True)
    for a, b, tokens, cluster in rows:
        residuals[cluster] = residuals.get(cluster, 0.0) + (a - b) - difference * tokens
    if len(residuals) < 2:
        return difference, math.inf
    return difference, _error_of_sum(list(residuals.values())) / total


def pareto(points: Iterable[Point]) -> list[Point]:
    """Points that no other beats in both losses, by domain loss."""
    front: list[Point] = []
    with_domain = [p for p in points if p.domain_nll is not None]
    for point in sorted(with_domain, key=lambda p: (p.domain_nll, p.answer_nll)):
        if not front or point.answer_nll < front[-1].answer_nll:
            front.append(point)
    return front


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
        "pareto": [slim(point) for point in pareto(choice.points)],
        "points": [slim(point) for point in choice.points],
    }


def _once(evaluate: Evaluate) -> tuple[Evaluate, dict[tuple[str, tuple[float, ...]], Point]]:
    """(`evaluate`, asked once for each setting; what it has said so far)."""
    seen: dict[tuple[str, tuple[float, ...]], Point] = {}

    def measure(method: str, weights: tuple[float, ...]) -> Point:
        if (method, weights) not in seen:
            seen[method, weights] = evaluate(method, weights)
        return seen[method, weights]

    return measure, seen


def _grid(measure: Evaluate, adapters: int) -> list[Point]:
    """A grid over two weights; with more adapters, the others stay at 1 and refinement moves them."""
    return [measure(SUM, (a, b) + (1.0,) * (adapters - 2)) for a, b in itertools.product(COARSE, COARSE[1:])]


def _neighbours(measure: Evaluate, method: str, here: Point, step: float) -> list[Point]:
    """One weight a step lower or higher; none is negative."""
    found = []
    for i, sign in itertools.product(range(len(here.weights)), (-1, 1)):
        weights = (*here.weights[:i], round(here.weights[i] + sign * step, 6), *here.weights[i + 1 :])
        if weights[i] >= 0:
            found.append(measure(method, weights))
    return found


def _towards_keeping(measure: Evaluate, start: Point, keeping: Keeping) -> Point:
    """From weights that lose too much of the domain, on a grid too coarse to hold better ones, to ones that keep it."""
    here, spent = start, 0
    for step in STEPS:
        while spent < MAX_REFINEMENTS and not keeping.likely(here):
            neighbours = _neighbours(measure, SUM, here, step)
            spent += len(neighbours)
            best = max(neighbours, key=lambda p: keeping.share(p)[0])
            if keeping.share(best)[0] <= keeping.share(here)[0]:
                break
            here = best
    return here


def _refined(measure: Evaluate, method: str, start: Point, feasible: Callable[[Point], bool]) -> Point:
    """Compass search: the best neighbour in one weight, while it improves, with ever smaller steps."""
    here, spent = start, 0
    for step in STEPS:
        while spent < MAX_REFINEMENTS:
            neighbours = _neighbours(measure, method, here, step)
            spent += len(neighbours)
            better = [p for p in neighbours if p.answer_nll < here.answer_nll and (feasible(p) or not feasible(here))]
            if not better:
                break
            here = _best(better)
    return here


def _fitted(measure: Evaluate, method: str, fit: FitPerLayer, start: Point) -> tuple[Point, Point]:
    """(out-of-fold losses, weights fitted on all of dev): so many weights would win on the data they were fitted to."""
    documents = sorted(set(start.clusters))
    halves = [documents[i::FOLDS] for i in range(FOLDS)]
    whole = measure(method, fit(start.weights, documents))
    if len(documents) < FOLDS:
        return whole, whole
    made = [measure(method, fit(start.weights, half)) for half in halves]
    fold = {document: i for i, half in enumerate(halves) for document in half}
    # an item's loss comes from the weights that were fitted without its document
    nlls = tuple(made[1 - fold[cluster]].answer_nlls[i] for i, cluster in enumerate(start.clusters))
    documents_nlls = tuple(sum(both) / FOLDS for both in zip(*(point.document_nlls for point in made), strict=True))
    return replace(whole, answer_nlls=nlls, document_nlls=documents_nlls), whole


def _choose(
    candidates: Sequence[tuple[str, Point]],
    final: dict[str, Point],
    points: tuple[Point, ...],
    feasible: Callable[[Point], bool],
    keeping: Keeping,
) -> ChosenWeights:
    gain, wanted = keeping.gain, f"{keeping.retention:.0%} of the domain gain"
    allowed = [point for _, point in candidates if feasible(point)]
    best = _best(allowed or [point for _, point in candidates])
    champions = tuple(Champion(label, p, *paired(p, best), feasible(p)) for label, p in candidates)
    good = [c for c in champions if (c.feasible or not allowed) and c.difference <= _one(c.standard_error)]
    chosen = good[0]
    if gain is None:
        constraint = "there are no dev documents to keep a domain gain on"
    elif gain <= 0:
        constraint = "the domain adapter alone does not gain on dev documents, so there is nothing to keep"
    elif not allowed:
        constraint = f"no weights keep {wanted}, so answers alone decide"
    elif feasible == keeping.surely:
        constraint = f"at least {wanted} is kept, with 95% confidence over {len(chosen.point.document_nlls)} documents"
    else:
        count = len(chosen.point.document_nlls)
        constraint = (
            f"at least {wanted} is kept on dev, whose {count} document{'s are' * (count > 1) or ' is'} no proof"
        )
    # the two goals may be at odds, and then a person has to know the price
    price = chosen.point.answer_nll - _best([p for p in points if p.method == SUM]).answer_nll
    if allowed and gain is not None and gain > 0 and price >= WORTH_SAYING:
        constraint += f", which costs {price:.2f} nats per answer token"
    reason = f"{chosen.label}: the simplest within one standard error of the best on dev; {constraint}"
    return ChosenWeights(final.get(chosen.label, chosen.point), champions, points, gain, reason)


def _error_of_sum(residuals: Sequence[float]) -> float:
    """Standard error of a sum of independent residuals with mean zero."""
    count = len(residuals)
    return math.sqrt(count / (count - 1) * sum(r * r for r in residuals))


def _one(standard_error: float) -> float:
    """One standard error; with a single document there is none, and only the best itself is good enough."""
    return standard_error if math.isfinite(standard_error) else 0.0


def _best(points: Sequence[Point]) -> Point:
    return min(points, key=lambda p: p.answer_nll)
