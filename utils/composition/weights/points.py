"""What was measured at one setting of the weights, and how two settings compare, with standard errors.

An answer's loss counts its end of turn, because without it weights win at which answers no longer end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

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

    def and_rest(self, rest: Point) -> Point:
        """The same setting on these items and on those of `rest`."""
        return replace(
            self,
            answer_nlls=self.answer_nlls + rest.answer_nlls,
            answer_tokens=self.answer_tokens + rest.answer_tokens,
            clusters=self.clusters + rest.clusters,
            document_nlls=self.document_nlls + rest.document_nlls,
            document_tokens=self.document_tokens + rest.document_tokens,
        )


Evaluate = Callable[[str, tuple[float, ...]], Point]
Allows = Callable[[Point], bool]


@dataclass(frozen=True)
class Keeping:
    """What has to be left of the domain adapter's gain on dev documents.

    `scale` is what the standard error is multiplied by: below 1 for a part that speaks for all of dev.
    """

    base: Point
    domain: Point
    retention: float
    scale: float = 1.0

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
        error = _error_of_sum(residuals) / sum(gains) if len(residuals) > 1 else math.inf
        return share, self.scale * error

    def surely(self, point: Point) -> bool:
        """The lower limit of the share (one-sided, 95%) is enough."""
        share, error = self.share(point)
        return share - SURE * error >= self.retention

    def likely(self, point: Point) -> bool:
        """The share itself is enough."""
        return self.share(point)[0] >= self.retention

    def rule(self, points: Iterable[Point]) -> Allows:
        """Where nothing is surely enough, what is enough by its value; where nothing is, nothing."""
        tried = list(points)
        return next((rule for rule in (self.surely, self.likely) if any(map(rule, tried))), self.likely)


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


def one(standard_error: float) -> float:
    """One standard error; with a single document there is none, and only the best itself is good enough."""
    return standard_error if math.isfinite(standard_error) else 0.0


def best_of(points: Sequence[Point], allows: Allows = lambda _: True) -> Point:
    """The point with the best answers among those that are allowed, or among all where none is."""
    return min([p for p in points if allows(p)] or points, key=lambda p: p.answer_nll)


def pareto(points: Iterable[Point]) -> list[Point]:
    """Points that no other beats in both losses, by domain loss."""
    front: list[Point] = []
    with_domain = [p for p in points if p.domain_nll is not None]
    for point in sorted(with_domain, key=lambda p: (p.domain_nll, p.answer_nll)):
        if not front or point.answer_nll < front[-1].answer_nll:
            front.append(point)
    return front


def _error_of_sum(residuals: Sequence[float]) -> float:
    """Standard error of a sum of independent residuals with mean zero."""
    count = len(residuals)
    return math.sqrt(count / (count - 1) * sum(r * r for r in residuals))
