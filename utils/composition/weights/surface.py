"""A quadratic model of every item's loss in the weights, from the settings that were measured.

Kriging (Rasmussen and Williams 2006, ch. 2) with a second-order polynomial kernel: the quadratic through the
measured points, of the least curvature where they leave some open, and a small local part that takes up what is no
quadratic. It is linear in the losses and has the same coefficients for every item, so that a prediction is a `Point`
like a measured one, item by item, and paired standard errors mean the same.

Shapes: P measured points, n weights, I items (answers, then documents).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from utils.composition.methods import METHODS, SUM
from utils.composition.weights.points import Point

# of the local part: its variance against that of slope and curvature, and how far it reaches
LOCAL, REACH = 1e-2, 0.5
# rounding of losses, against the variance of the slope
ROUNDING = 1e-6
# how far beyond what was measured a model says anything
BEYOND = 0.5


class Surface:
    """Losses of one method at any weights; those of the sum are among them, as equal weights."""

    def __init__(self, method: str, points: Sequence[Point]):
        """`points` of the method and of the sum, of the same items."""
        self.method = method
        known: dict[tuple[float, ...], Point] = {}
        for point in points:
            if point.method in (SUM, method):
                known[self._own(point.method, point.weights)] = point
        self.known, self.like = known, next(iter(known.values()))
        self.places_Pn = np.array(list(known))
        losses_PI = np.array([(*p.answer_nlls, *p.document_nlls) for p in known.values()])
        # around the middle of what was measured the loss is that there; elsewhere, by slope and curvature
        self.centre_n, self.mean_I = self.places_Pn.mean(0), losses_PI.mean(0)
        kernel_PP = self._kernel(self.places_Pn) + ROUNDING * np.eye(len(known))
        self.by_point_PI = np.linalg.solve(kernel_PP, losses_PI - self.mean_I)

    def at(self, method: str, weights: tuple[float, ...]) -> Point:
        """What was measured there, else what is expected."""
        own, like = self._own(method, weights), self.like
        count = len(like.answer_nlls)
        if own in self.known:
            found_I = np.array((*self.known[own].answer_nlls, *self.known[own].document_nlls))
        else:
            found_I = self.mean_I + (self._kernel(np.array([own])) @ self.by_point_PI)[0]
        losses = tuple(found_I.tolist())
        return Point(
            method,
            weights,
            losses[:count],
            like.answer_tokens,
            like.clusters,
            losses[count:],
            like.document_tokens,
        )

    def near(self, method: str, weights: tuple[float, ...]) -> Point:
        """As `at`, with infinite losses where that is too far from all that was measured."""
        own_n, point = np.array(self._own(method, weights)), self.at(method, weights)
        low_n, high_n = self.places_Pn.min(0) - BEYOND, self.places_Pn.max(0) + BEYOND
        if np.all(low_n <= own_n) and np.all(own_n <= high_n):
            return point
        return replace(
            point,
            answer_nlls=(math.inf,) * len(point.answer_nlls),
            document_nlls=(math.inf,) * len(point.document_nlls),
        )

    def knows(self, point: Point) -> bool:
        """Whether this is a measured setting, and not what a model expects of one."""
        return self._own(point.method, point.weights) in self.known

    def _own(self, method: str, weights: tuple[float, ...]) -> tuple[float, ...]:
        return weights if method == self.method else _repeated(weights, METHODS[self.method].per_adapter or 1)

    def _kernel(self, at_Qn: np.ndarray) -> np.ndarray:
        """Covariances (Q, P) of losses there with those at the measured points."""
        u_Qn, v_Pn = at_Qn - self.centre_n, self.places_Pn - self.centre_n
        products_QP = u_Qn @ v_Pn.T
        distances_QP = ((u_Qn[:, None] - v_Pn[None]) ** 2).sum(-1)
        local_QP = LOCAL * np.exp(-distances_QP / (2 * REACH**2))
        return 1 + products_QP + products_QP**2 + local_QP


def _repeated(weights: tuple[float, ...], numbers: int) -> tuple[float, ...]:
    """The weights of a sum as those of a method that takes so many for each adapter."""
    return tuple(weight for weight in weights for _ in range(numbers))
